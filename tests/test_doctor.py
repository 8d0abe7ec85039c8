from __future__ import annotations

import json
from pathlib import Path

import pytest

from retool import doctor
from retool.cli import main
from retool.doctor import PROBES, Check, examine, render

GOOD = Check("memory", True, "plenty", can=("Anything goes.",))
BROKEN = Check("disk", False, "full", mend="empty it")
LACKING = Check("extras", False, "none", mend="pip install some", needed=False)


def found_by(*checks: Check) -> dict[str, object]:
    return examine({check.name: lambda check=check: check for check in checks})  # type: ignore[misc]


def test_a_machine_in_order() -> None:
    found = found_by(GOOD)
    assert found["ok"] is True
    assert render(found) == "✓ memory  plenty\n\nAnything goes."


def test_something_needed_is_broken() -> None:
    found = found_by(GOOD, BROKEN)
    assert found["ok"] is False
    text = render(found)
    assert "✗ disk    full\n          → empty it" in text
    assert "Not in order: disk." in text
    assert "Anything goes" not in text


def test_something_optional_is_no_fault() -> None:
    found = found_by(GOOD, LACKING)
    assert found["ok"] is True
    assert "· extras  none\n          → pip install some" in render(found)


@pytest.mark.parametrize(
    ("error", "mend"), [(RuntimeError("no such\n  luck"), ""), (ModuleNotFoundError("no such luck"), doctor.REINSTALL)]
)
def test_a_probe_that_fails_is_an_answer(error: Exception, mend: str) -> None:
    def probe() -> Check:
        raise error

    found = examine({"torch": probe, "memory": lambda: GOOD})
    assert found["ok"] is False
    check = found["checks"][0]
    assert (check["name"], check["ok"], check["mend"]) == ("torch", False, mend)
    assert check["says"] == f"{type(error).__name__}: no such luck"


def test_this_machine_is_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the tests run the program must run; so the real probes must all be content with what is needed."""
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [check["name"] for check in found["checks"]] == list(PROBES)
    assert [check for check in found["checks"] if check["needed"] and not check["ok"]] == []
    assert (code, found["ok"]) == (0, True)
    facts = {check["name"]: check["facts"] for check in found["checks"]}
    assert facts["sandbox"]["p50_ms"] > 0
    assert facts["sandbox"]["tier"]
    assert facts["device"]["kind"] in ("cpu", "cuda")
    assert facts["memory"]["available_gb"] > 0
    assert found["can"]


@pytest.mark.parametrize(
    ("limit", "used", "stat", "gb"),
    [
        (None, None, "", 8.192),  # no cgroup v2
        ("max", 1, "", 8.192),
        (4_000_000_000, 1_000_000_000, "anon 1\ninactive_file 0\n", 3.0),
        (4_000_000_000, 3_500_000_000, "inactive_file 1500000000\n", 2.0),
        (100_000_000_000, 0, "inactive_file 0\n", 8.192),
    ],
)
def test_memory_is_what_is_left_of_the_machine_and_of_the_container(
    tmp_path: Path, limit: int | str | None, used: int | None, stat: str, gb: float
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n")
    if limit is not None:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(stat)
    assert doctor.available_memory_gb(meminfo, tmp_path) == pytest.approx(gb)

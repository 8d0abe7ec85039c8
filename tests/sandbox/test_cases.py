"""Every case in every tier, each on this machine where it can be had: one right answer, and then the next run is right,
a sibling lives, and no process, file, descriptor, mount or control group is left."""

from __future__ import annotations

import os
import platform
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import cases
import cases_elsewhere
import pytest
from tiers import CONDITIONS, Worker

ALL = sorted(cases.all_cases(), key=lambda case: (sorted(case.config.items()), case.number))
"""Those with the same limits one after another: each set of limits is another sandbox."""
DOCS = Path(__file__).parents[2] / "docs" / "sandbox.md"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Listeners of this process, and what else the code may look for."""
    folder = tmp_path_factory.mktemp("places")
    tcp, abstract, named = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(1)
    name = f"retool-test-{os.getpid()}"
    with tcp, abstract, named:
        abstract.bind(f"\0{name}")
        named.bind(str(folder / "socket"))
        for listener in (abstract, named):
            listener.listen()
        port = str(tcp.getsockname()[1])
        yield {
            "PORT": port,
            "ABSTRACT": name,
            "NAMED": str(folder / "socket"),
            "SECRET": "only-the-trainer-knows",
            "REPOSITORY": str(Path(__file__).parent / "cases.py"),
        }
        for listener in (tcp, abstract, named):
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()


@pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case.number}-{re.sub('[^a-zA-Z0-9]+', '-', case.name)}")
def test_case(worker: Worker, places: dict[str, str], case: cases.Case) -> None:
    expected = case.expected(worker.tier)
    if not expected.status:
        pytest.skip(expected.says)
    if case.only not in ("", platform.machine()):
        pytest.skip(f"machine code of {case.only}")
    expected.check(worker.run(case.program(places), case.timeout_s, config=case.config, **case.request))


def test_tier(worker: Worker) -> None:
    found = worker.ask("hello")
    assert found["tier"] == CONDITIONS[worker.condition]
    assert ("uid" in found["layers"]) == (worker.condition in ("full", "docker")), found
    refusal = worker.ask("refuse", tier="full")
    if worker.tier == "full":
        assert refusal == ""
    else:
        assert "\n" not in refusal
        assert re.match(
            r"sandbox\.tier = 'full': this machine gives '\w+'; the layer '\w+' is missing \(.+\)\. To get it: ",
            refusal,
        )


def test_every_case_of_the_list_is_there() -> None:
    numbers = {case.number for case in ALL} | {other.number for other in cases_elsewhere.CASES}
    assert numbers == set(range(1, max(numbers) + 1))
    assert max(numbers) > 52


@pytest.mark.parametrize("other", cases_elsewhere.CASES, ids=lambda other: str(other.number))
def test_other_cases_have_their_test(other: cases.Elsewhere) -> None:
    file, _, function = other.test.partition("::")
    assert f"def {function}(" in (Path(__file__).parent / file).read_text()


def test_the_tables_in_the_documentation() -> None:
    for table in (cases.table(), cases.layers_table()):
        assert table in DOCS.read_text(), "python tests/sandbox/cases.py prints the tables"

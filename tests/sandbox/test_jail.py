"""What the jail decides before it does anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from retool.errors import SandboxBroken, SandboxRefused
from retool.sandbox import jail, tree
from retool.sandbox.tier import check_tier, how_to_get_more, info_from_zygote

EVERYTHING = [layer.name for layer in jail.LAYERS]


def without(*names: str) -> list[str]:
    return [name for name in EVERYTHING if name not in names]


@pytest.mark.parametrize(
    ("layers", "tier"),
    [
        (EVERYTHING, "full"),
        (without("oom", "proc", "landlock"), "full"),
        (without("cgroup"), "userns"),
        (without("uid"), "userns"),
        (sorted(jail.candidates("restricted")), "restricted"),
        (without("net"), "restricted"),
        (without("net", "landlock"), ""),
        (without("seccomp"), ""),
        ([], ""),
    ],
)
def test_the_tier_is_the_strongest_whose_layers_are_all_there(layers: list[str], tier: str) -> None:
    assert jail.tier_of(layers) == tier


def said(layers: list[str], **missing: str) -> dict[str, object]:
    return {"layers": layers, "loaded": [], "skipped": [], "missing": missing}


def test_a_refusal_names_what_failed_and_how_to_get_it() -> None:
    info = info_from_zygote(said(sorted(jail.candidates("restricted")), user="PermissionError: no", cgroup="none"))
    check_tier(info, "restricted")
    with pytest.raises(SandboxRefused) as refused:
        check_tier(info, "full")
    line = str(refused.value)
    assert "\n" not in line
    assert line.startswith("sandbox.tier = 'full': this machine gives 'restricted'; the layer 'user' is missing (Perm")
    assert "seccomp=unconfined" in line and line.endswith("or set sandbox.tier = 'restricted'")
    assert how_to_get_more(info).startswith("for tier 'userns' (layer 'user'): allow ")


def test_where_nothing_is_missing_there_is_nothing_to_get() -> None:
    info = info_from_zygote(said(EVERYTHING))
    check_tier(info, "full")
    assert how_to_get_more(info) == ""


def test_below_the_weakest_tier_nothing_runs() -> None:
    with pytest.raises(SandboxBroken, match="cannot jail code here: seccomp: OSError"):
        info_from_zygote(said(without("seccomp"), seccomp="OSError: no such call"))


def test_the_disk_hides_no_packages() -> None:
    assert jail.home(["/usr/lib/python3.11"]) == "/tmp"
    assert jail.home(["/usr/lib/python3.11", "/tmp/work/.venv/lib"]) == "/sandbox"
    assert jail.home(["/tmpfoo/lib"]) == "/tmp"


def test_the_tree_holds_the_interpreter_and_nothing_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "site-packages").mkdir()
    held = tree.resolved(tree.contents([str(tmp_path / "site-packages")]))
    assert str(tmp_path / "site-packages") in held
    for path in held:
        assert not Path("/etc/passwd").is_relative_to(path)
        assert not Path.home().is_relative_to(path)
        assert not Path("/usr/bin").is_relative_to(path)


def test_paths_below_others_are_held_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert tree.resolved([str(tmp_path / "a" / "b"), str(tmp_path / "link"), str(tmp_path / "a")]) == [
        str(tmp_path / "a")
    ]

"""Control groups: what is found, where the sandbox's group goes, and, where this machine allows it, the real ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from retool.sandbox import cgroups

V1_GROUPS = "9:name=systemd:/\n8:pids:/a\n4:memory:/outer/inner\n1:cpu,cpuacct:/b\n0::/\n"
V1_MOUNTS = """\
24 20 0:22 / {root}/memory rw,relatime - cgroup cgroup rw,memory
25 20 0:23 / {root}/pids rw,relatime - cgroup cgroup rw,pids
26 20 0:24 / {root}/cpu rw,relatime shared:3 - cgroup cgroup rw,cpu,cpuacct
27 20 0:25 / {root}/unified rw,relatime - cgroup2 cgroup2 rw
28 20 0:26 / /proc rw - proc proc rw
"""
V2_GROUPS = "0::/user.slice/session.scope\n"
V2_MOUNTS = "24 20 0:22 / {root}/unified rw - cgroup2 cgroup2 rw,nsdelegate\n"


def fake_proc(folder: Path, groups: str, mounts: str, controllers: str = "") -> str:
    """A /proc/self whose cgroup mounts lie below ``folder``."""
    (folder / "unified").mkdir()
    (folder / "unified" / "cgroup.controllers").write_text(controllers)
    (folder / "cgroup").write_text(groups)
    (folder / "mountinfo").write_text(mounts.format(root=folder))
    return str(folder)


def test_version_1_has_a_hierarchy_for_each_controller(tmp_path: Path) -> None:
    found = {h.controllers: h.parent for h in cgroups.find(fake_proc(tmp_path, V1_GROUPS, V1_MOUNTS))}
    assert found == {
        ("memory",): f"{tmp_path}/memory/outer/inner",
        ("pids",): f"{tmp_path}/pids/a",
        ("cpu",): f"{tmp_path}/cpu/b",
    }


def test_version_2_has_one_for_all(tmp_path: Path) -> None:
    [found] = cgroups.find(fake_proc(tmp_path, V2_GROUPS, V2_MOUNTS, "cpuset cpu io memory pids"))
    assert (found.version, set(found.controllers)) == (2, {"memory", "pids", "cpu"})
    assert found.parent == f"{tmp_path}/unified/user.slice/session.scope"


def test_a_mount_of_a_part_is_seen_from_inside(tmp_path: Path) -> None:
    mounts = "24 20 0:22 /user.slice {root}/unified rw - cgroup2 cgroup2 rw\n"
    [found] = cgroups.find(fake_proc(tmp_path, V2_GROUPS, mounts, "memory pids"))
    assert found.parent == f"{tmp_path}/unified/session.scope"


@pytest.mark.parametrize("controllers", ["", "memory cpu", "pids"])
def test_a_missing_controller_is_named(tmp_path: Path, controllers: str) -> None:
    with pytest.raises(OSError, match=r"no cgroup hierarchy with the controller '(memory|pids)' is mounted"):
        cgroups.find(fake_proc(tmp_path, V2_GROUPS, V2_MOUNTS, controllers))


def a_group(folder: Path, *, takes: bool = True) -> Path:
    """A folder that looks like a group of version 2; ``takes`` = False: its children can have no controllers."""
    folder.mkdir()
    (folder / "cgroup.procs").touch()
    control = folder / "cgroup.subtree_control"
    control.touch() if takes else control.mkdir()  # writing to a folder fails, as writing to a busy group does
    return folder


def test_the_sandboxs_group_goes_below_its_own(tmp_path: Path) -> None:
    own = a_group(a_group(tmp_path / "above") / "own")
    hierarchy = cgroups.Hierarchy(2, ("memory", "pids", "cpu"), str(own))
    made = cgroups._make_parent(hierarchy, "retool-x")
    assert made == str(own / "retool-x")
    assert (own / "retool-x" / "cpu.weight").read_text() == str(cgroups.CPU_WEIGHT)


def test_or_as_near_above_it_as_the_kernel_allows(tmp_path: Path) -> None:
    above = a_group(tmp_path / "above")
    own = a_group(above / "own", takes=False)
    made = cgroups._make_parent(cgroups.Hierarchy(2, ("memory", "pids"), str(own)), "retool-x")
    assert made == str(above / "retool-x")
    assert not (own / "retool-x").exists()


def test_or_nowhere(tmp_path: Path) -> None:
    own = a_group(tmp_path / "own", takes=False)
    with pytest.raises(OSError):
        cgroups._make_parent(cgroups.Hierarchy(2, ("memory", "pids"), str(own)), "retool-x")
    assert not (own / "retool-x").exists()


def test_memory_of_version_2_does_not_grow_into_swap(tmp_path: Path) -> None:
    (tmp_path / "memory.max").touch()
    cgroups.set_memory(str(tmp_path), 123)
    assert (tmp_path / "memory.max").read_text() == "123"
    assert (tmp_path / "memory.swap.max").read_text() == "0"


@pytest.mark.parametrize(
    ("name", "text", "kills"),
    [
        ("memory.events", "low 0\noom 3\noom_kill 2\noom_group_kill 0\n", 2),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n", 5),
        ("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n", 0),
    ],
)
def test_the_kernels_kills_are_counted(tmp_path: Path, name: str, text: str, kills: int) -> None:
    (tmp_path / name).write_text(text)
    assert cgroups.oom_kills(str(tmp_path)) == kills


EATER = """
import os, sys
for join in sys.argv[1].split():
    os.write(int(join), b"0")
print("joined", flush=True)
x = bytearray(200 << 20)
print("not bounded")
"""


def test_real_groups_bound_and_go_away() -> None:
    try:
        groups = cgroups.Groups("test", memory_mb=32, file_mb=1, processes=8)
    except OSError as error:
        pytest.skip(f"no control groups can be made here: {error}")
    try:
        joins = groups.open_slot("0")
        folder = os.path.join(groups.memory_folder(), "0")
        done = subprocess.run(
            [sys.executable, "-c", EATER, " ".join(map(str, joins))], pass_fds=joins, capture_output=True, text=True
        )
        assert (done.returncode, done.stdout) == (-9, "joined\n"), done
        assert cgroups.oom_kills(folder) == 1
        cgroups.set_memory(folder, 512 << 20)
        cgroups.set_memory(folder, 64 << 20)
        groups.close_slot("0", joins)
        assert not os.path.exists(folder)
    finally:
        groups.remove()
    assert not any(os.path.exists(folder) for _, folder in groups.folders)

"""Files that go into a run and come out of it, in every tier."""

from __future__ import annotations

import pytest
from tiers import Worker

from retool.types import ExecutionRequest

MIB = 1 << 20
SMALL = {"file_mb": 4}


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "", ".", "a//b", "a/./b", "x" * 300, "a\0b", "\ud800"]
)
def test_names(name: str) -> None:
    for fields in ({"files": {name: b""}}, {"fetch": (name,)}):
        with pytest.raises(ValueError, match="file name"):
            ExecutionRequest("", 1.0, **fields)


def test_files_arrive_and_come_back(worker: Worker) -> None:
    files = {"a.bin": bytes(range(256)), "deep/er/b": b"b", "ä ö\n'\"*": b"odd", "-rf": b"", "empty": b""}
    code = "import os\nprint(len(os.listdir('.')))\nopen('deep/er/c', 'wb').write(open('a.bin', 'rb').read() * 2);"
    found = worker.run(code, files=files, fetch=[*files, "deep/er/c"])
    assert found["stdout"] == "5\n512\n"
    assert found["files"] == {**files, "deep/er/c": bytes(range(256)) * 2}
    assert found["not_fetched"] == {}


def test_two_hundred_files(worker: Worker) -> None:
    files = {f"f{n}": f"{n}".encode() * n for n in range(200)}
    found = worker.run("1", files=files, fetch=list(files))
    assert found["files"] == files


NOT_FETCHED = {
    "symbolic link": ("import os; os.symlink('/etc/hostname', 'f')", "a symbolic link"),
    "link on the way": ("import os; os.symlink('/etc', 'd')", "a symbolic link"),
    "link up": ("import os; os.mkdir('e'); os.symlink('..', 'd')", "a symbolic link"),
    "link to itself": ("import os; os.symlink('f', 'f')", "a symbolic link"),
    "absent": ("", "No such file"),
    "folder": ("import os; os.mkdir('f')", "not a regular file"),
    "FIFO": ("import os; os.mkfifo('f')", "not a regular file"),
    "socket": (
        "import os, stat\ntry: os.mknod('f', stat.S_IFSOCK | 0o600)\nexcept OSError: os.mkdir('f')",
        "not a regular file|No such device",
    ),
    "device": (
        "import os, stat\ntry: os.mknod('f', stat.S_IFCHR | 0o600, os.makedev(1, 5))\nexcept OSError: pass",
        "No such file",
    ),
    "sparse, 10 GB": (
        "import os\nopen('f', 'w')\ntry: os.truncate('f', 10 << 30)\nexcept OSError: os.unlink('f')",
        "No such file",
    ),
    "a file in the way": ("open('d', 'w')", "Not a directory"),
}


@pytest.mark.parametrize("name", NOT_FETCHED)
def test_what_is_not_fetched(worker: Worker, name: str) -> None:
    code, reason = NOT_FETCHED[name]
    wanted = "d/hostname" if "'d'" in code else "f"
    found = worker.run(code, fetch=[wanted], config=SMALL)
    assert found["files"] == {}
    assert any(part in found["not_fetched"][wanted] for part in reason.split("|")), found


def test_files_are_capped_together(worker: Worker) -> None:
    code = f"for name in 'abc': open(name, 'wb').truncate({3 * MIB // 2}); open(name + 'x', 'w').write('x')"
    found = worker.run(code, fetch=["a", "b", "c", "ax"], config=SMALL)
    assert set(found["files"]) == {"a", "b", "ax"}
    assert found["files"]["a"] == bytes(3 * MIB // 2)
    assert "more than may be brought back" in found["not_fetched"]["c"]


def test_file_without_rights(worker: Worker) -> None:
    # Only the two that hold no more rights than the run itself may refuse.
    found = worker.run("import os\nopen('f', 'w').write('x')\ntry: os.chmod('f', 0)\nexcept OSError: pass", fetch=["f"])
    assert found["files"] == {"f": b"x"} or "Permission denied" in found["not_fetched"]["f"], found


def test_placed_file_in_the_way(worker: Worker) -> None:
    found = worker.run("print('not reached')", files={"a": b"x", "a/b": b"y"})
    assert (found["status"], found["exit_code"], found["stdout"]) == ("error", 1, "")
    assert "FileExistsError" in found["stderr"] or "NotADirectoryError" in found["stderr"], found


def test_too_much_to_place(worker: Worker) -> None:
    found = worker.run("print('not reached')", files={"a": bytes(6 * MIB)}, config=SMALL)
    assert (found["status"], found["exit_code"], found["stdout"]) == ("error", 1, "")
    assert "OSError" in found["stderr"], found


def test_files_after_a_deadline(worker: Worker) -> None:
    code = "open('f', 'w').write('kept')\nopen('f').close()\nwhile True: pass"
    found = worker.run(code, 0.4, fetch=["f"])
    assert (found["status"], found["files"]) == ("timeout", {"f": b"kept"})


def test_swapped(worker: Worker) -> None:
    found = worker.call("swapped", times=20)
    assert set(found) <= {"mine", "", "a symbolic link"}, found

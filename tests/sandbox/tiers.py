"""What a machine can allow, made here: one worker process per condition, which holds sandboxes and serves requests.

    full          as root, with control groups
    userns        as a user without rights
    docker        as root with the rights and the system calls that a container has by default
    restricted    as a user without rights, under the same filter

As a program (``tiers.py CONDITION``) this is the worker: it puts itself under the condition, then answers lines of JSON
on stdin with lines of JSON on stdout (``sandbox_worker``). As a module it is what starts and asks workers.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import platform
import select
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "src"
CONDITIONS = {"full": "full", "userns": "userns", "docker": "restricted", "restricted": "restricted"}
"""Conditions, each with the tier that a sandbox must reach under it."""
NOBODY = 65534
PATIENCE_S = 60.0
"""Only bounds a failing test."""

_libc = ctypes.CDLL(None, use_errno=True)
_X86 = platform.machine() == "x86_64"
_NEWNS, _NEWUSER, _NEWPID = 0x00020000, 0x10000000, 0x20000000
_MS_BIND, _MS_REC, _MS_PRIVATE = 4096, 16384, 1 << 18
_CLONE_NEW = 0x7E020000
"""All the CLONE_NEW* flags that clone(2) knows."""
_DOCKER_CAPABILITIES = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31)
"""chown, dac_override, fowner, fsetid, kill, setgid, setuid, setpcap, net_bind_service, net_raw, sys_chroot, mknod,
audit_write, setfcap (linux/capability.h)."""
_FORBIDDEN = ((272, 308, 165, 166, 155), (97, 268, 40, 39, 41))[0 if _X86 else 1]
"""unshare, setns, mount, umount2, pivot_root."""
_CLONE, _CLONE3 = (56 if _X86 else 220), 435


class SkippedCondition(Exception):
    """This machine, or who runs the tests, cannot bring the condition about."""


# -- the condition, in the worker --------------------------------------------------------------------------------------


def enter(condition: str) -> None:
    """Put this process under the condition, for good."""
    if condition == "full":
        return
    if os.geteuid() == 0:
        _open_ancestors()
    if condition in ("docker", "restricted"):
        _filter_calls()
    if condition == "docker":
        _drop_capabilities(_DOCKER_CAPABILITIES)
    elif os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        _libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: else its own /proc entries are root's


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = [None if text is None else text.encode() for text in (source, target, kind, data)]
    _check(_libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]), f"mount on {target}")


def _needed() -> list[str]:
    """Folders that Python and the tests have to read, as they are spelt on the way and as they are called really."""
    found = {sys.base_prefix, sys.prefix, str(SOURCES), str(HERE)}
    link = sys.executable
    while os.path.islink(link):
        link = os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link)))
        found.add(os.path.dirname(link))
    found |= {os.path.realpath(path) for path in found}
    return [path for path in sorted(found) if not any(path.startswith(other + "/") for other in found)]


def _closed_ancestor(path: str) -> str | None:
    """The topmost folder above ``path`` that others may not walk through."""
    parents = [str(parent) for parent in reversed(Path(path).parents)]
    return next((parent for parent in parents if not os.stat(parent).st_mode & 1), None)


def _open_ancestors() -> None:
    """In a mount namespace of its own, let every user walk to what is needed."""
    _check(_libc.unshare(_NEWNS), "unshare")
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    hidden = [(path, closed) for path in _needed() if (closed := _closed_ancestor(path)) is not None]
    handles = {path: os.open(path, os.O_PATH) for path, _ in hidden}
    for closed in sorted({closed for _, closed in hidden}):
        _mount("tmpfs", closed, "tmpfs", 0, "mode=755")
    for path, handle in handles.items():
        os.makedirs(path, 0o755)
        _mount(f"/proc/self/fd/{handle}", path, None, _MS_BIND | _MS_REC)
        os.close(handle)


def _filter_calls() -> None:
    """Refuse new namespaces and mounts as Docker's default profile does."""
    from retool.sandbox import seccomp

    load, equal, anyset, give = 0x20, 0x15, 0x45, 0x06
    eperm, enosys, allow = 0x00050001, 0x00050026, 0x7FFF0000
    code = [(load, 0, 0, 0)]  # the system call's number
    for number in _FORBIDDEN:
        code += [(equal, 0, 1, number), (give, 0, 0, eperm)]
    code += [(equal, 0, 1, _CLONE3), (give, 0, 0, enosys)]
    code += [(equal, 1, 0, _CLONE), (give, 0, 0, allow), (load, 0, 0, 16)]  # clone's flags
    code += [(anyset, 0, 1, _CLONE_NEW), (give, 0, 0, eperm), (give, 0, 0, allow)]
    if os.geteuid() != 0:
        _libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which root does not need
    seccomp.install(b"".join(struct.pack("=HBBI", *line) for line in code), notify=False)


def _drop_capabilities(kept: tuple[int, ...]) -> None:
    for number in range(64):
        if number not in kept:
            _libc.prctl(24, number, 0, 0, 0)  # PR_CAPBSET_DROP
    mask = sum(1 << number for number in kept)
    low = (mask & 0xFFFFFFFF,) * 2 + (0,)
    sets = (ctypes.c_uint32 * 6)(*low, 0, 0, 0)
    _check(_libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), sets), "capset")


# -- whether the condition can be had, in the tests --------------------------------------------------------------------


def check_condition(condition: str) -> None:
    """Raises: SkippedCondition, with the reason."""
    root = os.geteuid() == 0
    if condition in ("full", "docker") and not root:
        raise SkippedCondition("the tests do not run as root")
    if condition == "full":
        sys.path.insert(0, str(SOURCES))
        from retool.sandbox import cgroups

        try:
            cgroups.Groups("probe", 64, 1, 8).remove()
        except OSError as error:
            raise SkippedCondition(f"no control groups: {error}") from None
    if condition in ("full", "userns") and not _can_have_namespaces(as_user=condition == "userns"):
        raise SkippedCondition("no namespaces can be made here")


def _can_have_namespaces(as_user: bool) -> bool:
    pid = os.fork()
    if pid == 0:
        if as_user and os.geteuid() == 0:
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        made = _libc.unshare(_NEWUSER) == 0 and _libc.unshare(_NEWNS | _NEWPID) == 0
        os._exit(0 if made else 1)
    return os.waitpid(pid, 0)[1] == 0


# -- asking a worker, in the tests -------------------------------------------------------------------------------------


class Worker:
    """A running worker.

    Raises:
        SkippedCondition: its condition cannot be had.
    """

    def __init__(self, condition: str) -> None:
        check_condition(condition)
        self.condition, self.tier = condition, CONDITIONS[condition]
        self.marks: set[str] = set()
        self._folder = tempfile.mkdtemp(prefix="retool-test-")
        os.chmod(self._folder, 0o1777)
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "tiers.py"), condition],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": self._folder, "TRAINERS_SECRET": "only-the-trainer-knows"},
        )
        self._rest = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, patience_s: float = PATIENCE_S, **arguments: Any) -> Any:
        """What the worker answers.

        Raises:
            AssertionError: it found something amiss, or does not answer.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self._process.stdin.flush()
        answer = json.loads(self._line(patience_s))
        self.marks |= set(answer["marks"])
        assert "error" not in answer, f"[{self.condition}] {answer['error']}"
        return answer["value"]

    def _line(self, patience_s: float) -> bytes:
        assert self._process.stdout is not None
        handle = self._process.stdout.fileno()
        while b"\n" not in self._rest:
            if not select.select([handle], [], [], patience_s)[0]:
                self._process.kill()
                raise AssertionError(f"the worker {self.condition} has not answered for {patience_s:g} s")
            data = os.read(handle, 1 << 20)
            assert data, f"the worker {self.condition} ended with {self._process.wait()}"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def run(self, code: str, timeout_s: float = 30.0, **request: Any) -> dict[str, Any]:
        """One program in the sandbox that the worker keeps for this ``config``; the fields of its Execution.

        ``code`` may hold surrogates. ``files`` and ``stdin`` are bytes."""
        return self.run_all([request_of(code, timeout_s, **request)], request.get("config") or {})[0]

    def run_all(self, requests: list[dict[str, Any]], config: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """Several at once."""
        for request in requests:
            request.pop("config", None)
        found = self.ask("run", requests=requests, config=config or {})
        for answer in found:
            answer["files"] = {name: base64.b64decode(data) for name, data in answer["files"].items()}
        return list(found)

    def call(
        self, scenario: str, config: dict[str, Any] | None = None, patience_s: float = PATIENCE_S, **arguments: Any
    ) -> Any:
        """Run a function of ``scenarios`` in the worker, with a sandbox of its own."""
        return self.ask("call", patience_s, scenario=scenario, config=config or {}, arguments=arguments)

    def close(self) -> None:
        """End it; what it and its sandboxes left behind is an AssertionError."""
        from leftovers import traces

        try:
            if self._process.poll() is None:
                self.ask("end")
        finally:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.close()
            self._process.stdout.close()
            self._process.wait(PATIENCE_S)
        for mark in self.marks:
            assert traces(mark) == []
        os.rmdir(self._folder)  # it must be empty


def request_of(code: str, timeout_s: float, **rest: Any) -> dict[str, Any]:
    request = {"code": code, "timeout_s": timeout_s, **rest}
    if "stdin" in request:
        request["stdin"] = base64.b64encode(request["stdin"]).decode()
    if "files" in request:
        request["files"] = {name: base64.b64encode(data).decode() for name, data in request["files"].items()}
    return request


if __name__ == "__main__":
    sys.path[:0] = [str(SOURCES), str(HERE)]
    enter(sys.argv[1])
    import sandbox_worker

    sandbox_worker.main(CONDITIONS[sys.argv[1]])

"""The worker's side of ``tiers``: it keeps sandboxes, runs what it is asked to, and looks after each run for what the
run may have done to the next one, to its siblings and to this process."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import json
import os
import sys
import traceback
from typing import Any

import leftovers

from retool.config import SandboxConfig
from retool.errors import SandboxRefused
from retool.sandbox import LocalSandbox
from retool.types import Execution, ExecutionRequest, ExecutionStatus

PRELOAD = ["math", "random"]
SETTLE_S = 15.0
"""Only bounds a failing test."""
LOOK = """
import builtins, os, sys
def listed(path):
    try:
        return sorted(os.listdir(path))
    except OSError:
        return None
found = [os.getcwd(), listed('.'), listed('/dev/shm'), sorted(os.environ), len(sys.modules)]
found.append(oct(os.umask(0o77)))
processes = listed('/proc') or []
found.append(sum(name.isdigit() for name in processes))
if found[0] in ('/tmp', '/sandbox'):
    room = os.statvfs('.')
    found.append((room.f_bfree, room.f_ffree))
    found.append([oct(os.stat(path).st_mode) for path in ('.', '/dev/shm')])
    found.append(os.listxattr('.'))
print('still here', found)
"""
"""What every run must find the same."""


class Kept:
    """A sandbox with one slot for the runs, and one interpreter, a sibling, that must outlive them all."""

    def __init__(self, config: dict[str, Any], tier: str) -> None:
        self.sandbox = LocalSandbox(SandboxConfig(**({"workers": 1, "preload": PRELOAD} | config)))
        self.tier = tier
        self.mark = ""
        self.looks: set[str] = set()
        self.descriptors = 0
        self.processes = 0

    async def open(self) -> None:
        info = await self.sandbox.start()
        assert info.tier == self.tier, (info.tier, info.missing)
        self.mark = await leftovers.identify(self.sandbox)
        sibling = await self.sandbox.execute("sibling = 'alive'", 30, session="sibling")
        assert sibling.status is ExecutionStatus.OK, sibling
        for _ in range(2):
            self.looks.add((await self.sandbox.execute(LOOK, 30)).stdout)
        assert all(look.startswith("still here") for look in self.looks), self.looks
        if self.tier != "restricted":
            assert len(self.looks) == 1, self.looks
        await asyncio.sleep(0.1)
        self.processes = len(leftovers.below(self.sandbox))
        self.descriptors = leftovers.count_descriptors()

    async def check(self) -> None:
        """The next run is right, the sibling lives, and there is not a process or a descriptor more than before."""
        after = await self.sandbox.execute(LOOK, 30)
        assert after.status is ExecutionStatus.OK, after
        expected = self.looks if self.tier != "restricted" else {_without_folder(look) for look in self.looks}
        found = after.stdout if self.tier != "restricted" else _without_folder(after.stdout)
        assert found in expected, (found, expected)
        sibling = await self.sandbox.execute("sibling", 30, session="sibling")
        assert sibling.stdout == "'alive'\n", sibling
        await leftovers.until(lambda: self.settled(), SETTLE_S, self.state)

    def settled(self) -> bool:
        return (
            leftovers.count_descriptors() <= self.descriptors and len(leftovers.below(self.sandbox)) <= self.processes
        )

    def state(self) -> str:
        return (
            f"{leftovers.count_descriptors()} descriptors, {self.descriptors} before; "
            f"{leftovers.describe(leftovers.below(self.sandbox))}, {self.processes} before"
        )


def _without_folder(look: str) -> str:
    """In a tier without file systems of its own each slot has another folder."""
    return look.partition(", ")[2]


class Server:
    def __init__(self, tier: str) -> None:
        self.tier = tier
        self.kept: dict[str, Kept] = {}
        self.marks: set[str] = set()
        self.before = leftovers.snapshot()

    async def answer(self, question: dict[str, Any]) -> Any:
        return await getattr(self, "do_" + question.pop("do"))(**question)

    async def _kept(self, config: dict[str, Any]) -> Kept:
        key = json.dumps(config, sort_keys=True)
        if key not in self.kept:
            for other in list(self.kept):  # one at a time: what is counted is all of this process's
                await self._close(self.kept.pop(other))
            kept = self.kept[key] = Kept(config, self.tier)
            await kept.open()
            self.marks.add(kept.mark)
        return self.kept[key]

    async def _close(self, kept: Kept) -> None:
        await kept.sandbox.close()
        await leftovers.nothing_since(self.before, kept.mark)

    async def do_hello(self) -> dict[str, Any]:
        info = (await self._kept({})).sandbox.info
        assert info is not None
        return {"tier": info.tier, "layers": list(info.layers), "missing": info.missing, "pid": os.getpid()}

    async def do_run(self, requests: list[dict[str, Any]], config: dict[str, Any]) -> list[dict[str, Any]]:
        kept = await self._kept(config)
        zygote = kept.sandbox.zygote_pid
        found = await asyncio.gather(*(kept.sandbox.run(_request(one)) for one in requests))
        assert kept.sandbox.zygote_pid == zygote, "the zygote did not survive"
        for one in {request["session"] for request in requests if request.get("session")}:
            kept.sandbox.release(one)
        await kept.check()
        assert all(one.result.tier == self.tier for one in found if one.result.status is not ExecutionStatus.INFRA)
        return [_answer(one) for one in found]

    async def do_call(self, scenario: str, config: dict[str, Any], arguments: dict[str, Any]) -> Any:
        import scenarios

        for other in list(self.kept):
            await self._close(self.kept.pop(other))
        sandbox = LocalSandbox(SandboxConfig(**({"workers": 2, "preload": PRELOAD} | config)))
        try:
            info = await sandbox.start()
            assert info.tier == self.tier, (info.tier, info.missing)
            self.marks.add(mark := await leftovers.identify(sandbox))
            value = await getattr(scenarios, scenario)(sandbox, **arguments)
        finally:
            await sandbox.close()
        await leftovers.nothing_since(self.before, mark)
        return value

    async def do_refuse(self, tier: str) -> str:
        """The line with which a stronger tier is refused."""
        for other in list(self.kept):
            await self._close(self.kept.pop(other))
        sandbox = LocalSandbox(SandboxConfig(workers=1, preload=PRELOAD, tier=tier))
        try:
            await sandbox.start()
        except SandboxRefused as refusal:
            text = str(refusal)
        else:
            text = ""
        await sandbox.close()
        await leftovers.nothing_since(self.before)
        return text

    async def do_end(self) -> None:
        for other in list(self.kept):
            await self._close(self.kept.pop(other))


def _request(fields: dict[str, Any]) -> ExecutionRequest:
    fields = dict(fields)
    if "stdin" in fields:
        fields["stdin"] = base64.b64decode(fields["stdin"])
    if "files" in fields:
        fields["files"] = {name: base64.b64decode(data) for name, data in fields["files"].items()}
    if "fetch" in fields:
        fields["fetch"] = tuple(fields["fetch"])
    return ExecutionRequest(**fields)


def _answer(found: Execution) -> dict[str, Any]:
    result = found.result
    return {
        "status": str(result.status),
        "exit_code": result.exit_code,
        "stdout": result.stdout,
        "stderr": result.stderr,
        "truncated": result.truncated,
        "duration_s": result.duration_s,
        "files": {name: base64.b64encode(data).decode() for name, data in found.files.items()},
        "not_fetched": dict(found.not_fetched),
    }


async def _serve(tier: str, answers: int) -> None:
    server = Server(tier)
    loop = asyncio.get_running_loop()
    await loop.run_in_executor(None, lambda: None)  # the executor's own descriptors and thread come before the count
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        try:
            answer: dict[str, Any] = {"value": await server.answer(json.loads(line))}
        except AssertionError as error:
            answer = {"error": f"{error}\n{traceback.format_exc(limit=-2)}"}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answer["marks"] = sorted(server.marks)
        data = json.dumps(answer).encode() + b"\n"
        while data:
            data = data[os.write(answers, data) :]


def main(tier: str) -> None:
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come here, and are found
    answers = os.dup(1)
    os.dup2(2, 1)
    asyncio.run(_serve(tier, answers))

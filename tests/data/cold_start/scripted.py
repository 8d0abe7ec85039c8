"""A teacher that says what a script says, behind a real HTTP server on loopback."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from retool.data.cold_start.prompt import messages_for
from retool.data.problem import Problem


@dataclass(frozen=True)
class Say:
    """One reaction of the teacher."""

    text: str = ""
    finish: str = "stop"
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    raw: bytes | None = None
    """Sent as it is instead of a completion."""
    drip_s: float = 0.0
    """Not 0: ``raw`` is sent a byte at a time, with such pauses."""
    usage: bool = True
    """Whether the completion counts its tokens."""
    reset: bool = False
    """Close the connection instead."""


Script = Callable[[str, int], Say]
"""``(question, how often it was asked before) → reaction``."""


class ScriptedTeacher:
    def __init__(self, script: Script, problems: list[Problem]) -> None:
        self.script = script
        self.questions = {str(messages_for(p)[-1]["content"]): p.question for p in problems}
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        """Completions that were sent whole."""
        self.running = self.most_running = 0
        self.authorizations: set[str] = set()
        self.bodies: list[dict[str, Any]] = []
        self.url = ""
        self.refuses = ""
        """A field of the body that is not supported."""
        self.models: set[str] = set()
        """Those that are served; empty: any."""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.authorizations.add(request.headers.get("Authorization", ""))
        if self.refuses in body:
            said = f"Unsupported parameter: '{self.refuses}'. Use 'max_completion_tokens' instead."
            return web.json_response({"error": {"message": said}}, status=400)
        if self.models and body["model"] not in self.models:
            return web.json_response({"error": {"message": f"no model {body['model']}"}}, status=404)
        question = self.questions.get(body["messages"][-1]["content"], "?")
        before = self.asked[question]
        self.asked[question] += 1
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            said = self.script(question, before)
            await asyncio.sleep(said.delay_s)
            if said.reset:
                assert request.transport is not None
                request.transport.abort()
            if said.raw is not None and said.drip_s:
                return await drip(request, said)
            if said.raw is not None:
                return web.Response(body=said.raw, content_type="application/json")
            if said.status != 200:
                return web.json_response({"error": {"message": said.text}}, status=said.status, headers=said.headers)
            response = web.json_response(completion(said))
            await response.prepare(request)
            await response.write_eof()
            self.answered[question] += 1
            return response
        finally:
            self.running -= 1


async def drip(request: web.Request, said: Say) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)
    for byte in said.raw or b"":
        await response.write(bytes([byte]))
        await asyncio.sleep(said.drip_s)
    return response


def completion(said: Say) -> dict[str, Any]:
    message = {"role": "assistant", "content": said.text}
    return {
        "id": "c", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": said.finish}],
        **({"usage": {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}} if said.usage else {}),
    }  # fmt: skip


@contextmanager
def serving(script: Script, problems: list[Problem]) -> Iterator[ScriptedTeacher]:
    """The teacher, listening in a thread of its own."""
    teacher = ScriptedTeacher(script, problems)
    loop = asyncio.new_event_loop()
    ready, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", teacher.handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        teacher.url = f"http://{host}:{port}/v1"
        ready.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    ready.wait()
    try:
        yield teacher
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()

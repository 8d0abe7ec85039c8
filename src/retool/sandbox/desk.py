"""Between the zygote, which is inside, and its launcher, which is outside and keeps the machine's rights: what can only
be done from there. One SOCK_SEQPACKET pair; every question waits for its answer.

Standard library only: the zygote imports it.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

_MOST = 1 << 17
_MOST_DESCRIPTORS = 16


class Desk:
    """The zygote's side."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def _ask(self, **question: Any) -> tuple[dict[str, Any], list[int]]:
        self._send(**question)
        return self._receive()

    def _send(self, **question: Any) -> None:
        self._end.sendall(json.dumps(question).encode())

    def _receive(self) -> tuple[dict[str, Any], list[int]]:
        data, descriptors, _, _ = socket.recv_fds(self._end, _MOST, _MOST_DESCRIPTORS)
        if not data:
            raise BrokenPipeError
        answer: dict[str, Any] = json.loads(data)
        if "error" in answer:
            raise OSError(answer["error"])
        return answer, descriptors

    def map_users(self) -> bool:
        """Map user numbers into the namespace that this process has just made; whether it is a range of them.

        Raises:
            OSError: not even one could be mapped.
        """
        return bool(self._ask(ask="map")[0]["many"])

    def open_slot(self, slot: int) -> list[int]:
        """Descriptors by which to join the slot's control groups; none where there are no groups.

        Raises:
            OSError: they could not be made.
        """
        return self._ask(ask="open", slot=slot)[1]

    def close_slot(self, slot: int) -> None:
        self._ask(ask="close", slot=slot)

    def hand_over(self, pid: int) -> None:
        """Say that the zygote is ``pid``. Its parent in between says so and ends; the answer is the zygote's, which
        knows by it that its parent is the launcher now."""
        self._send(ask="child", pid=pid)

    def take_over(self) -> None:
        self._receive()

    def tell(self, **what: Any) -> None:
        """How the start went."""
        self._ask(ask="told", **what)

    def close(self) -> None:
        self._end.close()


def receive(end: socket.socket) -> dict[str, Any] | None:
    """The launcher's side: the next question; None where nobody is left to ask."""
    try:
        data = end.recv(_MOST)
    except ConnectionResetError:
        return None
    return json.loads(data) if data else None


def reply(end: socket.socket, descriptors: list[int] | None = None, **answer: Any) -> None:
    try:
        socket.send_fds(end, [json.dumps(answer).encode()], descriptors or [])
    except (BrokenPipeError, ConnectionResetError):
        return  # the asker is gone; the next receive says so
    finally:
        for descriptor in descriptors or []:
            os.close(descriptor)

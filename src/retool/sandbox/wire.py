"""What supervisor, zygote and child say to each other.

The supervisor and the zygote share one SOCK_SEQPACKET pair: one packet is one message. User code never holds either
end: a child closes everything but its descriptors 0–2 before it runs a line of it.

Imported by the zygote, which has no site-packages yet: standard library only.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    READY = 1
    """Zygote: warmed up; JSON in ``body``."""
    CHILD = 2
    """Zygote: a jailed child waits. ``number`` = pid; three descriptors: code socket, stdout, stderr."""
    EXIT = 3
    """Zygote: the kernel says that a child ended. ``number`` = wait status, ``peak_kb`` and ``at`` are set."""
    ACK = 4
    """Zygote: a KILL was carried out."""
    KILL = 5
    """Supervisor: kill a child and its process group."""
    START = 6
    """Supervisor: the first message; JSON in ``body``."""


class Packet(NamedTuple):
    kind: Kind
    child: int = 0
    """The child's number, never used twice by one zygote."""
    number: int = 0
    peak_kb: int = 0
    """Largest resident size that the child had."""
    at: float = 0.0
    """When, on the monotonic clock that all processes of the machine share."""
    body: bytes = b""


_HEAD = struct.Struct("!BQqqd")
MAX_PACKET = 1 << 16

CODE_HEAD = struct.Struct("!dQ")
"""Supervisor to child: seconds allowed, bytes of UTF-8 source that follow."""


def pack(packet: Packet) -> bytes:
    return _HEAD.pack(*packet[:5]) + packet.body


def unpack(data: bytes) -> Packet:
    kind, child, number, peak_kb, at = _HEAD.unpack_from(data)
    return Packet(Kind(kind), child, number, peak_kb, at, data[_HEAD.size :])

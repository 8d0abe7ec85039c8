"""What supervisor, zygote, keepers and children say to each other.

The supervisor shares one SOCK_SEQPACKET pair with the zygote (``control``) and one with each slot (``channel``): one
packet is one message. A child shares a stream with the supervisor over which it gets its code. User code never holds
any of them: a child keeps its descriptors 0–2 alone when it runs a line of it.

Imported by the zygote, which has no site-packages yet: standard library only.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple


class Kind(IntEnum):
    START = 1
    """Supervisor to launcher, the first message; JSON in ``body``."""
    READY = 2
    """Launcher: warmed up and probed; JSON in ``body``. ``number`` = the zygote's pid."""
    SLOT = 3
    """Zygote: a keeper was made. ``number`` = slot; one descriptor: its channel."""
    GROW = 4
    """Supervisor to zygote: one more slot."""
    RETIRE = 5
    """Supervisor to zygote: do not make slot ``number`` again."""
    CHILD = 6
    """Keeper: a child was made, and will read its code once it is jailed; descriptors: pidfd, the pipe into which its
    code goes, stdout, stderr."""
    LISTENER = 7
    """Keeper, for all its children, or child, for itself: one descriptor, the listener of its end."""
    EXIT = 8
    """Keeper: the kernel says that its child ended. ``number`` = wait status, ``peak_kb`` and ``at`` are set."""
    FETCH = 9
    """Supervisor to keeper, before the child's end: bring these files then. One descriptor: a pipe to write them to;
    JSON in ``body``: names, and ``most`` bytes."""


NOT_JAILED = 125
"""Exit code of a child that could not be jailed, as env(1) and timeout(1) use it for their own failure; such a child
has not read its code either."""
CELL_ENDED = 0x100
"""Beside an exit code: the program has ended, its interpreter waits for the next one."""


class Packet(NamedTuple):
    kind: Kind
    number: int = 0
    peak_kb: int = 0
    """Largest resident size that the child had."""
    at: float = 0.0
    """When, on the monotonic clock that all processes of the machine share."""
    body: bytes = b""


_HEAD = struct.Struct("!Bqqd")
_INT = struct.Struct("=i")
MAX_PACKET = 1 << 17
_MAX_DESCRIPTORS = 6
_ANCILLARY = socket.CMSG_SPACE(_MAX_DESCRIPTORS * _INT.size)
# Plain numbers: those of the socket module are enumerations, slow to combine.
_SOL_SOCKET, _SCM_RIGHTS, _CLOEXEC = int(socket.SOL_SOCKET), int(socket.SCM_RIGHTS), int(socket.MSG_CMSG_CLOEXEC)
DO_NOT_WAIT = int(socket.MSG_DONTWAIT)


def pack(packet: Packet) -> bytes:
    return _HEAD.pack(*packet[:4]) + packet.body


def head(kind: int, number: int = 0, peak_kb: int = 0, at: float = 0.0) -> bytes:
    """``pack`` for who has to be quick: a keeper's every object is another page to write to."""
    return _HEAD.pack(kind, number, peak_kb, at)


def send(end: socket.socket, data: bytes, descriptors: tuple[int, ...]) -> None:
    """One packet with descriptors."""
    rights = struct.pack(f"={len(descriptors)}i", *descriptors)
    end.sendmsg([data], [(_SOL_SOCKET, _SCM_RIGHTS, rights)])


def unpack(data: bytes) -> Packet:
    kind, number, peak_kb, at = _HEAD.unpack_from(data)
    return Packet(Kind(kind), number, peak_kb, at, data[_HEAD.size :])


def receive(end: socket.socket, flags: int = 0) -> tuple[bytes, list[int]]:
    """One packet and the descriptors that came with it; empty where the other side is gone.

    socket.recv_fds would do, but that it forgets the flags (Python 3.11 to 3.13)."""
    data, ancillary, _, _ = end.recvmsg(MAX_PACKET, _ANCILLARY, flags | _CLOEXEC)
    found: list[int] = []
    for level, kind, content in ancillary:
        if level == _SOL_SOCKET and kind == _SCM_RIGHTS:
            found += [number for (number,) in _INT.iter_unpack(content[: len(content) // _INT.size * _INT.size])]
    return data, found


# -- what a child gets -------------------------------------------------------------------------------------------------

_ORDER = struct.Struct("!dQQQ?QQQ")
_CHUNK = 1 << 20


class Order(NamedTuple):
    """One program and what it may use."""

    code: bytes
    cpu_s: float
    memory_bytes: int
    file_bytes: int
    processes: int
    stays: bool = False
    """Whether the interpreter waits for more when the program has ended."""
    stdin: bytes = b""
    files: Mapping[str, bytes] = {}


def pack_order(order: Order) -> bytes:
    sizes = {name: len(data) for name, data in order.files.items()}
    names = json.dumps(sizes).encode() if sizes else b""
    head = _ORDER.pack(
        order.cpu_s,
        order.memory_bytes,
        order.file_bytes,
        order.processes,
        order.stays,
        len(order.code),
        len(order.stdin),
        len(names),
    )
    return b"".join((head, order.code, order.stdin, names, *order.files.values()))


def receive_order(descriptor: int) -> Order | None:
    """Read one order from a pipe; None where the other side closed it first."""
    data = _read(descriptor, b"", _ORDER.size)
    if data is None:
        return None
    cpu_s, memory, file_bytes, processes, stays, code_size, stdin_size, names_size = _ORDER.unpack_from(data)
    stdin_at = _ORDER.size + code_size
    names_at = stdin_at + stdin_size
    at = names_at + names_size
    data = _read(descriptor, data, at)
    if data is None:
        return None
    files = {}
    if names_size:
        sizes = json.loads(data[names_at:at])
        data = _read(descriptor, data, at + sum(sizes.values()))
        if data is None:
            return None
        for name, size in sizes.items():
            files[name] = data[at : at + size]
            at += size
    return Order(
        data[_ORDER.size : stdin_at], cpu_s, memory, file_bytes, processes, stays, data[stdin_at:names_at], files
    )


def _read(descriptor: int, data: bytes, size: int) -> bytes | None:
    """``data`` and what follows it in the pipe, ``size`` bytes at least; None where it ends before."""
    if len(data) >= size:
        return data
    parts = [data]
    missing = size - len(data)
    while missing > 0:
        part = os.read(descriptor, _CHUNK)
        if not part:
            return None
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


# -- files that come back ----------------------------------------------------------------------------------------------

_FILE = struct.Struct("!?Q")
"""Before each file, in the order of the names: whether it could be read; bytes of its content, or of the reason."""


def pack_file(readable: bool, data: bytes) -> bytes:
    return _FILE.pack(readable, len(data)) + data


def unpack_files(data: bytes, names: list[str]) -> tuple[dict[str, bytes], dict[str, str]]:
    """Contents and reasons by name; a name that was cut off has a reason too."""
    files: dict[str, bytes] = {}
    reasons: dict[str, str] = {}
    at = 0
    for name in names:
        if len(data) < at + _FILE.size:
            reasons[name] = "the sandbox ended before it was read"
            continue
        readable, size = _FILE.unpack_from(data, at)
        at += _FILE.size
        part = data[at : at + size]
        at += size
        if len(part) < size:
            reasons[name] = "the sandbox ended before it was read"
        elif readable:
            files[name] = part
        else:
            reasons[name] = part.decode("utf-8", "replace")
    return files, reasons

"""Turn the zygote's private memory into a few private mappings of one file in memory, so that forking it costs little.

fork(2) copies a page-table entry for every anonymous page and a record for every mapping, and the child's end takes
them down again: with numpy and sympy loaded these are 14,000 pages and 350 mappings, and most of the time of a short
run. Entries of a file mapping whose pages nobody has written to are not copied; a child maps those that it touches,
sixteen at a time, and what it writes to is copied for it alone, as before. And neighbours of one file become one
mapping: so the small libraries go into the file too, with their code. It may then be written to by the process that
runs it, which a process that runs ctypes may do anyway. Measurements are in docs/log.md.

The contents must not change between saving a region and mapping it again, and every line of Python changes some. So the
whole sequence of pwrite(2) and mmap(2) calls is laid out beforehand as a chain of contexts (makecontext(3)), each of
which calls one C function and passes on to the next; it runs without a line of Python in between.

Standard library only: the zygote imports it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
from collections.abc import Iterator
from typing import NamedTuple

_RW, _RWX = mmap.PROT_READ | mmap.PROT_WRITE, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
_MAP_PRIVATE, _MAP_FIXED = 2, 16
_MFD_CLOEXEC = 1
_PAGE = os.sysconf("SC_PAGE_SIZE")
_NAME = "retool-zygote"
_CLEAN = 1 << 63 | 1 << 61
"""Present, and a page of a file (Documentation/admin-guide/mm/pagemap.rst)."""
_STEP = 4 * _PAGE
_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 1, 2
_SMALL = 1 << 19
"""Read-only parts of libraries up to this size are copied; larger ones are worth their own mapping."""
_CONTEXT_BYTES, _STACK_BYTES = 8192, 8192
"""Room for one ucontext_t (968 bytes on x86-64, 4,560 on aarch64), and for one C call."""
# ucontext_t: unsigned long uc_flags; ucontext_t *uc_link; stack_t uc_stack {void *ss_sp; int ss_flags; size_t ss_size}
_LINK_AT, _STACK_AT, _STACK_SIZE_AT = 8, 16, 32

Call = tuple[object, tuple[int, ...]]


class Region(NamedTuple):
    """One mapping of this process."""

    start: int
    end: int
    rights: str
    name: str
    """A path, empty, or a kind in brackets."""


def compact() -> int:
    """Do it; the number of mappings that there are less now, 0 where this platform is not known to stand it.

    The process must have one thread, and nobody may read its memory meanwhile.

    Raises:
        OSError: there is not enough memory for the copy, or /proc is not there. Nothing has changed then.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    if platform.libc_ver()[0] != "glibc" or platform.machine() not in ("x86_64", "aarch64"):
        return 0
    handle = os.memfd_create(_NAME, _MFD_CLOEXEC)
    try:
        chunks = list(_chunks(list(_regions()), _may_run_code(libc, handle)))
        _run_chain(libc, list(_calls(libc, handle, chunks)))
        _give_zeros_back(libc, handle)
    finally:
        os.close(handle)
    return sum(len(chunk) - 1 for chunk in chunks)


def _may_run_code(libc: ctypes.CDLL, handle: int) -> bool:
    """Whether pages of the file may be mapped writable and executable: some kernels are told to refuse that."""
    os.ftruncate(handle, _PAGE)
    address = libc.mmap(None, ctypes.c_size_t(_PAGE), _RWX, _MAP_PRIVATE, handle, ctypes.c_long(0))
    if address is None or address == ctypes.c_void_p(-1).value:
        return False
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(_PAGE))
    return True


def _regions() -> Iterator[Region]:
    with open("/proc/self/maps") as file:
        lines = file.read().splitlines()
    for line in lines:
        span, rights, *_, name = (line + " ").split(" ", 5)
        start, _, end = span.partition("-")
        yield Region(int(start, 16), int(end, 16), rights, name.strip())


def _chunks(regions: list[Region], with_code: bool) -> Iterator[list[Region]]:
    """Neighbours that are to become one mapping."""
    chunk: list[Region] = []
    for region in regions:
        if not _is_taken(region, with_code):
            continue
        if chunk and chunk[-1].end != region.start:
            yield chunk
            chunk = []
        chunk.append(region)
    if chunk:
        yield chunk


def _is_taken(region: Region, with_code: bool) -> bool:
    if not region.rights.startswith("r") or region.rights[3] != "p":
        return False
    if region.rights == "rw-p":
        return not region.name.startswith("[") or region.name == "[heap]"
    return with_code and region.name.startswith("/") and region.end - region.start <= _SMALL


def _calls(libc: ctypes.CDLL, handle: int, chunks: list[list[Region]]) -> Iterator[Call]:
    """For each chunk: save what is in it, then map it again."""
    total = sum(chunk[-1].end - chunk[0].start for chunk in chunks)
    # The room is taken first: a chain that fails half-way could not be told from one that did its work.
    os.posix_fallocate(handle, 0, total)
    offset = 0
    for chunk in chunks:
        start, size = chunk[0].start, chunk[-1].end - chunk[0].start
        rights = _RW if all(region.rights == "rw-p" for region in chunk) else _RWX
        yield libc.pwrite, (handle, start, size, offset)
        yield libc.mmap, (start, size, rights, _MAP_PRIVATE | _MAP_FIXED, handle, offset)
        offset += size


def _give_zeros_back(libc: ctypes.CDLL, handle: int) -> None:
    """Much of what malloc has reserved was never touched: holes of the file read as zeros too."""
    size = os.fstat(handle).st_size
    nothing = bytes(_STEP)
    for offset in range(0, size, _STEP):
        if os.pread(handle, _STEP, offset) == nothing[: size - offset]:
            mode = ctypes.c_int(_FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE)
            libc.fallocate(handle, mode, ctypes.c_long(offset), ctypes.c_long(_STEP))


def drop_clean_pages() -> None:
    """Unmap what this process has only read of the file: the kernel maps sixteen pages where one was asked for, and
    every fork copies them all. They come back when they are touched.

    Raises:
        OSError: /proc is not there, or not readable.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for region in list(_regions()):
            if _NAME in region.name:
                for start, size in _clean_runs(region, pagemap):
                    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
    finally:
        os.close(pagemap)


def _clean_runs(region: Region, pagemap: int) -> Iterator[tuple[int, int]]:
    """Address and size of each run of pages that are mapped and still the file's."""
    count = (region.end - region.start) // _PAGE
    raw = os.pread(pagemap, 8 * count, region.start // _PAGE * 8)
    begin = -1
    for index in range(count + 1):
        entry = int.from_bytes(raw[8 * index : 8 * index + 8], sys.byteorder)  # 0 after the last
        if entry & _CLEAN == _CLEAN:
            begin = index if begin < 0 else begin
        elif begin >= 0:
            yield region.start + begin * _PAGE, (index - begin) * _PAGE
            begin = -1


def _run_chain(libc: ctypes.CDLL, calls: list[Call]) -> None:
    cell = _CONTEXT_BYTES + _STACK_BYTES
    # Shared, so that it is not among the regions: the chain must not move what it stands on.
    slab = mmap.mmap(-1, cell * (len(calls) + 1))
    view = ctypes.c_char.from_buffer(slab)
    base = ctypes.addressof(view)
    pointer, word = ctypes.c_void_p, ctypes.c_long
    following = base  # the first cell gets this very context, to which the last call returns
    for index in range(len(calls), 0, -1):
        context = base + index * cell
        function, arguments = calls[index - 1]
        libc.getcontext(pointer(context))
        ctypes.c_uint64.from_address(context + _LINK_AT).value = following
        ctypes.c_uint64.from_address(context + _STACK_AT).value = context + _CONTEXT_BYTES
        ctypes.c_uint64.from_address(context + _STACK_SIZE_AT).value = _STACK_BYTES
        libc.makecontext(pointer(context), function, len(arguments), *[word(value) for value in arguments])
        following = context
    libc.swapcontext(pointer(base), pointer(following))
    del view
    slab.close()

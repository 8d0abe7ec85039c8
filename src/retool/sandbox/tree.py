"""The file system that code sees: a read-only tree with the interpreter, its packages, the shared libraries that they
link against, five devices, and nothing else of the machine.

Standard library only: the zygote imports it.
"""

from __future__ import annotations

import glob
import os
import struct
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass

from retool.sandbox import kernel

DEVICES = ("null", "zero", "full", "random", "urandom")
_EMPTY = ("box", "tmp", "sandbox", "proc", "dev", "dev/shm")
"""Folders where a slot mounts its own."""
_LINKS = (("dev/fd", "/proc/self/fd"), ("dev/stdin", "fd/0"), ("dev/stdout", "fd/1"), ("dev/stderr", "fd/2"))
_EXTRAS = ("/etc/ld.so.cache", "/usr/share/zoneinfo")
_LOADERS = ("/lib64/ld-linux-*.so.*", "/lib/ld-linux-*.so.*", "/lib/ld-musl-*.so.*")
"""Where executables of this machine name their program interpreter."""
_PLACES = ("/tmp", "/mnt", "/run", "/")
"""What the tree may be mounted over before it becomes the root: folders that every user may walk to."""
_MAX_LINKS = 40  # the kernel's own limit (MAXSYMLINKS)
_AT_RECURSIVE = 0x8000
_ATTR_RDONLY, _ATTR_NOSUID = 1, 2


def contents(site_packages: list[str]) -> list[str]:
    """Paths that a Python program needs to be able to read, as they are called on this machine; some are links."""
    stdlib = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")]
    settings = os.path.join(sys.prefix, "pyvenv.cfg")
    libraries = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    loaders = [path for pattern in _LOADERS for path in glob.glob(pattern)]
    wanted = [sys.executable, settings, *stdlib, *site_packages, *_library_folders(), *libraries, *loaders, *_EXTRAS]
    return list(dict.fromkeys(path for path in wanted if os.path.isabs(path) and os.path.exists(path)))


def _library_folders() -> list[str]:
    """Folders of the shared objects that this very process has mapped."""
    with open("/proc/self/maps") as file:
        paths = {line.split(None, 5)[-1].strip() for line in file}
    return sorted({os.path.dirname(path) for path in paths if path.startswith("/") and ".so" in path})


def resolved(paths: list[str]) -> list[str]:
    """The real paths, without those that lie below another one."""
    kept: list[str] = []
    for path in sorted({os.path.realpath(path) for path in paths}):
        if not any(path.startswith(above + "/") for above in kept):
            kept.append(path)
    return kept


@dataclass(frozen=True)
class Source:
    """One thing of the machine that the tree will hold."""

    path: str
    handle: int
    """Opened (O_PATH) while the process still had its user, who alone may be able to walk to it."""
    is_folder: bool


@dataclass(frozen=True)
class Plan:
    sources: list[Source]
    links: list[tuple[str, str]]
    """Symbolic links and their targets."""


def open_sources(paths: list[str]) -> Plan:
    """Look up what the tree will hold; the handles stay open over a fork, and are closed by ``build``."""
    sources = []
    for path in resolved(paths) + [f"/dev/{name}" for name in DEVICES]:
        sources.append(Source(path, os.open(path, os.O_PATH | os.O_CLOEXEC), os.path.isdir(path)))
    links = dict(link for path in paths for link in _links_to(path))
    return Plan(sources, sorted(links.items()))


def build(plan: Plan) -> None:
    """Mount the tree over a folder of this mount namespace, read-only but for the devices, and go there.

    Raises:
        OSError: the kernel refused one of the mounts.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    place = next(folder for folder in _PLACES if os.path.isdir(folder))
    kernel.mount("tmpfs", place, "tmpfs", kernel.MS_NOSUID, "size=1m,mode=755")
    os.chdir(place)
    for name in _EMPTY:
        os.makedirs(name)
    for link, target in [*_LINKS, *plan.links]:
        os.makedirs(os.path.dirname("./" + link.strip("/")), exist_ok=True)
        os.symlink(target, link.strip("/"))
    for source in plan.sources:
        _bind(source)
    kernel.mount_setattr(".", _AT_RECURSIVE, struct.pack("QQQQ", _ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0))


def enter() -> None:
    """Make the current folder, which ``build`` went to, the root, and leave the old one."""
    kernel.pivot_root(".", ".")
    kernel.unmount(".")
    os.chdir("/")


def _bind(source: Source) -> None:
    target = source.path.strip("/")
    os.makedirs(os.path.dirname("./" + target), exist_ok=True)
    if source.is_folder:
        os.makedirs(target, exist_ok=True)
    elif not os.path.exists(target):
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o600))
    kernel.mount(f"/proc/self/fd/{source.handle}", target, None, kernel.MS_BIND | kernel.MS_REC)
    os.close(source.handle)


def _links_to(path: str) -> Iterator[tuple[str, str]]:
    """The symbolic links on the way from ``path`` to its real path, with their targets."""
    for _ in range(_MAX_LINKS):
        found = _first_link(path)
        if found is None:
            return
        link, rest = found
        target = os.readlink(link)
        yield link, target
        path = os.path.normpath(os.path.join(os.path.dirname(link), target, rest))


def _first_link(path: str) -> tuple[str, str] | None:
    """The first part of ``path`` that is a symbolic link, and what follows it."""
    parts = path.strip("/").split("/")
    for index in range(1, len(parts) + 1):
        head = "/" + "/".join(parts[:index])
        if os.path.islink(head):
            return head, "/".join(parts[index:])
    return None

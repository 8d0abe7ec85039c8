"""Remove or reuse a folder that nobody trusts. Standard library only: the zygote uses it too."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator


def wipe(folder: str) -> bool:
    """Remove ``folder`` and all below it; False where something could not be removed.

    Follows no symbolic link, and takes neither stack, descriptors nor path length from the depth of the tree: each
    subfolder is first moved up, to stand directly below ``folder``. Nothing may write to the tree meanwhile.
    """
    complete = empty(folder)
    try:
        os.rmdir(folder)
    except FileNotFoundError:
        pass
    except OSError:
        complete = False
    return complete


def empty(folder: str) -> bool:
    """Remove all below ``folder``, in the way of ``wipe``."""
    complete = True
    moved = 0
    tag = os.urandom(8).hex()  # a name that the tree's author could not take beforehand
    todo = [folder]
    while todo:
        current = todo.pop()
        for entry in _entries(current):
            try:
                if entry.is_dir(follow_symlinks=False):
                    os.chmod(entry.path, stat.S_IRWXU)
                    moved += 1
                    target = os.path.join(folder, f"{tag}-{moved}")
                    os.rename(entry.path, target)
                    todo.append(target)
                else:
                    os.unlink(entry.path)
            except OSError:
                complete = False
        if current != folder:
            with contextlib.suppress(OSError):
                os.rmdir(current)
    return complete


def is_pristine(folder: str, mode: int) -> bool:
    """Whether ``folder`` can serve again: the same as when it was made with ``mode``, but for its times.

    Reusing it matters: on some file systems removing a folder takes milliseconds (7 ms on one ext4, against 0.1 ms for
    making it), which would be the zygote's slowest step."""
    try:
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode):
            return False
        if stat.S_IMODE(found.st_mode) != mode:
            os.chmod(folder, mode)
        # Attributes of other kinds are the system's own.
        return not os.listdir(folder) and not any(name.startswith("user.") for name in os.listxattr(folder))
    except OSError:
        return False


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    try:
        os.chmod(folder, stat.S_IRWXU)
        with os.scandir(folder) as entries:
            # The whole list first: the loop's body changes the folder.
            yield from list(entries)
    except OSError:
        return

"""After its memory was moved under it, a process must be what it was, and forking it must copy little."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, decimal, fractions, gc, json, os, random, sqlite3, sys, zlib
import retool.sandbox.compact as c

def mappings():
    return len(open("/proc/self/maps").readlines())

def anonymous_kb():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def digest():
    data = repr(sorted((k, str(v)[:50]) for k, v in table.items())).encode()
    return zlib.crc32(data), str(decimal.Decimal(2).sqrt()), random.Random(7).random()

table = {i: [str(i)] * 3 for i in range(50_000)}
zeros = bytearray(32 << 20)  # reserved, never touched
before = digest(), mappings(), anonymous_kb(), sorted(os.listdir("/proc/self/fd"))
gone = c.compact()
left = anonymous_kb()  # before the digest, which counts a reference to every object and so writes to their pages
after = digest(), mappings(), left, sorted(os.listdir("/proc/self/fd"))
table[7].append("new")
zeros[5] = 1
pid = os.fork()
if pid == 0:
    table.clear()
    gc.collect()
    os._exit(0 if zeros[5] == 1 and zeros[31 << 20] == 0 else 1)
child = os.waitpid(pid, 0)[1]
import email.message  # new code still loads
found = {"gone": gone, "before": before, "after": after, "child": child, "kept": table[7], "size": len(table)}
print(json.dumps(found))
"""


def test_nothing_changes_but_the_mappings() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    if found["gone"] == 0:
        assert platform.libc_ver()[0] != "glibc" or platform.machine() not in ("x86_64", "aarch64")
        pytest.skip("this platform is left as it is")
    (digest, mappings, anonymous, descriptors), after = found["before"], found["after"]
    assert after[0] == digest
    assert after[3] == descriptors
    assert after[1] < mappings / 2
    assert after[2] < anonymous / 4
    assert (found["child"], found["kept"], found["size"]) == (0, ["7"] * 3 + ["new"], 50_000)

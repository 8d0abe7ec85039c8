"""What this machine can do, what is missing, and how to get it.

Each probe looks at one thing and answers a ``Check``; a probe that fails is itself an answer, never a crash. Figures
are measured now, on this machine; what they allow is an estimate and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import re
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retool.sandbox import SandboxInfo

GB = 10**9

NEEDED_PYTHON = (3, 11)
NEEDED_MEMORY_GB = 2.0
"""torch and a tiny model take under 1 GB; the rest is one program at the sandbox's default limit."""
NEEDED_DISK_GB = 1.0
"""A quickstart's run folder is tens of megabytes; below this, checkpoints of anything larger do not fit."""
BYTES_PER_PARAMETER = 16
"""Full fine-tuning with AdamW in mixed precision: 2 weights + 2 gradients + 12 fp32 master weights and moments
(Rajbhandari et al. 2020, ZeRO, section 3.1)."""
MEMORY_FOR_THE_MODEL = 0.8
"""Share of a GPU's memory for those; the rest holds activations and the KV cache."""
SANDBOX_RUNS = 9
SANDBOX_TIMEOUT_S = 20.0
TIER_LEAVES_OPEN = {
    "userns": "the memory of a run's processes together is not bounded, only each one's",
    "restricted": "a run is one process (threads only), and its files lie on this machine's disk, bounded each",
}
"""What a weaker tier lacks next to the strongest, in a few words; docs/sandbox.md has the whole table."""
REINSTALL = "make setup, or pip install -c constraints.txt -e ."


@dataclass(frozen=True)
class Check:
    """What one probe found."""

    name: str
    ok: bool
    says: str
    """One line for people."""
    mend: str = ""
    """What to do where it is not ok, or could be better."""
    needed: bool = True
    """Whether nothing works without it."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same for programs; JSON types."""
    can: tuple[str, ...] = ()
    """What this allows, in whole sentences."""


def check_python() -> Check:
    version = platform.python_version()
    return Check(
        "python",
        sys.version_info >= NEEDED_PYTHON,
        f"{version}, {platform.system()} {platform.machine()}",
        mend="" if sys.version_info >= NEEDED_PYTHON else "install Python 3.11 or newer",
        facts={"version": version, "system": platform.system(), "machine": platform.machine()},
    )


def check_packages() -> Check:
    """Whether every required package is installed in a version that pyproject.toml allows."""
    wrong = [entry for entry in _unmet_requirements() if not entry[0]]
    names = [text for _, text in wrong]
    return Check(
        "packages",
        not wrong,
        "all there" if not wrong else "not as needed: " + "; ".join(names),
        mend=REINSTALL if wrong else "",
        facts={"unmet": names},
    )


def check_extras() -> Check:
    """Which optional groups of packages are not (wholly) installed."""
    missing: dict[str, list[str]] = {}
    for extra, text in _unmet_requirements():
        if extra:
            missing.setdefault(extra, []).append(text)
    says = "; ".join(f"{extra}: {', '.join(texts)}" for extra, texts in missing.items())
    return Check(
        "extras",
        not missing,
        f"not installed: {says}" if missing else "all there",
        mend=f"pip install -c constraints.txt -e '.[{','.join(missing)}]'" if missing else "",
        needed=False,
        facts={"missing": missing},
    )


def _unmet_requirements() -> list[tuple[str, str]]:
    """Pairs of an extra's name (empty: always needed) and what is wrong, e.g. ``torch 2.5 (needs >=2.6)``."""
    from importlib.metadata import PackageNotFoundError, metadata, requires, version

    from packaging.requirements import Requirement

    unmet = []
    extras = ["", *(metadata("retool").get_all("Provides-Extra") or [])]
    for requirement in map(Requirement, requires("retool") or []):
        for extra in extras:
            marker = requirement.marker
            if (marker is not None) != bool(extra) or (marker is not None and not marker.evaluate({"extra": extra})):
                continue
            try:
                found = version(requirement.name)
            except PackageNotFoundError:
                unmet.append((extra, requirement.name))
                continue
            if not requirement.specifier.contains(found, prereleases=True):
                unmet.append((extra, f"{requirement.name} {found} (needs {requirement.specifier})"))
    return unmet


def check_torch() -> Check:
    import torch

    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    return Check(
        "torch",
        True,
        f"{torch.__version__}, {cores} CPU cores, {threads} threads by default",
        facts={"version": str(torch.__version__), "cores": cores, "threads": threads},
        can=("The quickstart runs here: a tiny model, on the CPU.",),
    )


def check_device() -> Check:
    """The GPU, proven by a sum computed on it; or the CPU, which is no fault."""
    import torch

    if not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
        built = torch.version.cuda is not None
        why = "an NVIDIA GPU seems to be there, but torch cannot use it" if driver else "no GPU"
        mend = ""
        if driver:
            mend = "update the NVIDIA driver" if built else "install a CUDA build of torch (pytorch.org, Get Started)"
        return Check(
            "device",
            not driver,
            f"cpu: {why}",
            mend=mend,
            needed=False,
            facts={"kind": "cpu", "torch_cuda": torch.version.cuda},
            can=("Models of some millions of parameters can be trained; for larger ones use a GPU.",),
        )
    count = torch.cuda.device_count()
    name, total = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    free = torch.cuda.mem_get_info(0)[0]
    works = float(torch.ones(8, device="cuda").sum().item()) == 8.0
    bf16 = torch.cuda.is_bf16_supported()
    billions = free * MEMORY_FOR_THE_MODEL / BYTES_PER_PARAMETER / 1e9
    return Check(
        "device",
        works and bf16,
        f"cuda: {count} × {name}, {total / GB:.0f} GB, {free / GB:.0f} GB free" + ("" if bf16 else ", no bfloat16"),
        mend="" if works and bf16 else "use model.device=cpu, or model.dtype=float32 on this GPU",
        needed=False,
        facts={
            "kind": "cuda",
            "count": count,
            "name": name,
            "memory_gb": total / GB,
            "free_gb": free / GB,
            "bf16": bf16,
        },
        can=(
            f"By an estimate of {BYTES_PER_PARAMETER} bytes a parameter, one GPU trains all of a model of up to "
            f"{billions:.1f} billion parameters.",
            *(["The local engine uses one GPU; --engine verl uses several (docs/cluster.md)."] if count > 1 else []),
        ),
    )


def check_memory() -> Check:
    """Memory free to this process: the machine's, or less where a container limits it."""
    available = available_memory_gb()
    enough = available >= NEEDED_MEMORY_GB
    return Check(
        "memory",
        enough,
        f"{available:.1f} GB available",
        mend="" if enough else f"free some: {NEEDED_MEMORY_GB:.0f} GB are needed",
        facts={"available_gb": available},
    )


def available_memory_gb(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """GB that this process can still get.

    Raises:
        ValueError: ``meminfo`` is not the kernel's.
    """
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    if match is None:
        raise ValueError(f"{meminfo} has no MemAvailable")
    available = int(match.group(1)) * 1024 / GB
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max": no limit of its own
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        cache = re.search(r"^inactive_file (\d+)$", (cgroup / "memory.stat").read_text(), re.MULTILINE)
        # The kernel gives the page cache back before it runs out; counted as used, a busy container looks full.
        available = min(available, (limit - used + (int(cache.group(1)) if cache else 0)) / GB)
    return available


def check_disk() -> Check:
    free = shutil.disk_usage(".").free / GB
    enough = free >= NEEDED_DISK_GB
    return Check(
        "disk",
        enough,
        f"{free:.0f} GB free here",
        mend="" if enough else f"free some, or set run.out to another disk: {NEEDED_DISK_GB:.0f} GB are needed",
        facts={"free_gb": free},
    )


def check_sandbox() -> Check:
    """Starts the sandbox as a job would and runs ``print(1 + 1)`` a few times."""
    found = asyncio.run(_measure_sandbox())
    if isinstance(found, str):
        return Check("sandbox", False, found, mend="read the line above; retool sandbox run FILE shows more")
    first_s, latencies, info = found
    from retool.sandbox.tier import how_to_get_more

    p50_ms = 1e3 * statistics.median(latencies)
    lacks = TIER_LEAVES_OPEN.get(info.tier)
    missing = "; ".join(f"{name} ({reason})" for name, reason in info.missing.items())
    return Check(
        "sandbox",
        True,
        f"tier {info.tier!r}, print(1 + 1) in {p50_ms:.1f} ms (the first in {first_s:.2f} s, with the start)",
        mend=how_to_get_more(info) if lacks else "",
        facts={**asdict(info), "p50_ms": p50_ms, "first_s": first_s},
        can=(
            f"A model's code runs behind: {', '.join(info.layers)}.",
            *([f"In this tier {lacks}. Not to be had here: {missing}."] if lacks else []),
        ),
    )


async def _measure_sandbox() -> tuple[float, list[float], SandboxInfo] | str:
    """Seconds to the first answer, seconds of each later one, and what was found at start; or what went wrong."""
    from retool.sandbox import LocalSandbox
    from retool.types import ExecutionStatus

    start = time.perf_counter()
    first_s, latencies = 0.0, []
    async with LocalSandbox() as box:
        for run in range(SANDBOX_RUNS + 1):
            before = time.perf_counter()
            result = await box.execute("print(1 + 1)", SANDBOX_TIMEOUT_S)
            now = time.perf_counter()
            if result.status is not ExecutionStatus.OK or result.stdout.strip() != "2":
                return f"print(1 + 1) ended with {result.status}: {result.text.strip()[-200:]!r}"
            if run == 0:
                first_s = now - start
            else:
                latencies.append(now - before)
        info = box.info
    return (first_s, latencies, info) if info is not None else "started, but says nothing about itself"


Probe = Callable[[], Check]
PROBES: dict[str, Probe] = {
    "python": check_python,
    "packages": check_packages,
    "torch": check_torch,
    "device": check_device,
    "memory": check_memory,
    "disk": check_disk,
    "sandbox": check_sandbox,
    "extras": check_extras,
}


def examine(probes: dict[str, Probe] = PROBES) -> dict[str, Any]:
    """Run the probes.

    Returns:
        ``ok`` (nothing needed is broken), ``checks`` (each ``Check``'s fields, JSON types) and ``can`` (sentences).
    """
    checks = [_answer(name, probe) for name, probe in probes.items()]
    ok = all(check.ok for check in checks if check.needed)
    return {
        "ok": ok,
        "checks": [asdict(check) for check in checks],
        "can": [sentence for check in checks for sentence in check.can] if ok else [],
    }


def _answer(name: str, probe: Probe) -> Check:
    try:
        return probe()
    except Exception as error:  # whatever breaks here is what the doctor was asked to find
        says = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Check(name, False, says, mend=REINSTALL if isinstance(error, ImportError) else "")


def render(found: dict[str, Any]) -> str:
    """What ``examine`` found, as text."""
    lines = []
    width = max(len(check["name"]) for check in found["checks"])
    for check in found["checks"]:
        mark = "✓" if check["ok"] else "✗" if check["needed"] else "·"
        lines.append(f"{mark} {check['name']:<{width}}  {check['says']}")
        if check["mend"]:
            lines.append(f"  {'':<{width}}  → {check['mend']}")
    lines.append("")
    broken: Sequence[str] = [check["name"] for check in found["checks"] if check["needed"] and not check["ok"]]
    if broken:
        lines.append(f"Not in order: {', '.join(broken)}.")
    lines += found["can"]
    return "\n".join(lines)

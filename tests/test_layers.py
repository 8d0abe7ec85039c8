"""Layers import downwards only. The table is the one in docs/architecture.md, as data."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import retool

PACKAGE = Path(retool.__file__).parent


@dataclass(frozen=True)
class Row:
    """What one module or folder of the package may import: our own units, and packages from outside."""

    layer: int
    units: frozenset[str]
    packages: frozenset[str] = frozenset()


def row(layer: int, *units: str, packages: str = "") -> Row:
    return Row(layer, frozenset(units), frozenset(packages.split()))


GROUND = ("types", "errors", "config", "protocols")
MIDDLE = ("formats", "data", "grading", "sandbox", "store", "metrics", "progress")
LEARNING = ("rollout", "tail", "algo", "engine")

TABLE: dict[str, Row] = {
    "types": row(0),
    "errors": row(0),
    "config": row(0, "errors", packages="pydantic pydantic_core tomli_w"),
    "protocols": row(0, "types"),
    "health": row(1, "types", "errors", "config", "metrics"),
    "trackers": row(1, *GROUND, "store", packages="torch wandb tensorboard"),
    "formats": row(1, *GROUND, packages="tokenizers transformers"),
    "data": row(1, *GROUND, *MIDDLE, packages="datasets openai pyarrow"),
    "grading": row(1, *GROUND, packages="math_verify sympy latex2sympy2_extended"),
    "sandbox": row(1, *GROUND, packages="aiohttp prometheus_client pydantic pydantic_core"),
    "store": row(1, *GROUND, packages="pyarrow numpy"),
    "metrics": row(1, *GROUND, packages="numpy"),
    "progress": row(1, packages="rich"),
    "rollout": row(2, *GROUND, *MIDDLE),
    "tail": row(2, "types", "rollout"),
    "algo": row(2, *GROUND, packages="torch"),
    "engine": row(
        3, *GROUND, *MIDDLE, "rollout", "algo", packages="torch transformers safetensors tokenizers numpy peft"
    ),
    "cluster": row(
        3,
        *GROUND,
        *MIDDLE,
        "rollout",
        "health",
        "trackers",
        packages="torch transformers peft verl ray hydra omegaconf transfer_queue psutil pyarrow",
    ),
    "collect": row(4, *GROUND, *MIDDLE, *LEARNING),
    "update": row(4, *GROUND, "metrics", "algo", "engine", packages="torch"),
    "sft": row(4, *GROUND, *MIDDLE, *LEARNING, "trackers"),
    "rl": row(4, *GROUND, *MIDDLE, *LEARNING, "evaluate", "collect", "update", "health", "trackers"),
    "evaluate": row(4, *GROUND, *MIDDLE, *LEARNING, packages="torch numpy"),
    "nano": row(4, *GROUND, *MIDDLE, *LEARNING, packages="click torch numpy tokenizers transformers safetensors"),
    "doctor": row(4, *GROUND, "sandbox", packages="torch packaging"),
    "memory": row(1, *GROUND),
    "plan": row(4, *GROUND, "data", "doctor", "memory", packages="torch pyarrow huggingface_hub"),
    "report": row(4, "types", "errors", "store", "metrics", packages="jinja2 markupsafe matplotlib numpy pygments"),
    "viewer": row(4, "types", "errors", "store", "metrics", packages="jinja2 markupsafe pygments"),
    "quickstart": row(
        5, *GROUND, *MIDDLE, *LEARNING, "sft", "rl", "evaluate", "nano", "report", "doctor", packages="torch numpy"
    ),
}
TABLE["cli"] = row(5, *TABLE, packages="click uvloop")

NO_TORCH = (
    "types",
    "errors",
    "config",
    "protocols",
    "formats",
    "grading",
    "sandbox",
    "store",
    "metrics",
    "progress",
    "health",
)
"""Besides rollout and cli: what must be usable, and quick to import, where torch is not wanted."""


def unit_of(module: str) -> str:
    """``engine`` for ``retool.engine.kv``; empty for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def modules_of(package: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(package.rglob("*.py")):
        parts = list(path.relative_to(package).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        yield ".".join(["retool", *parts]), path


def imports_of(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import in the file, those inside functions and ``import_module("…")`` too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}" if base == "retool" else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                yield node.lineno, str(node.args[0].value)


def faults_of(package: Path) -> list[str]:
    """Every import that the table does not allow, and every module that it does not know."""
    faults = []
    for module, path in modules_of(package):
        unit = unit_of(module)
        if unit and unit not in TABLE:
            faults.append(f"{module} has no row in the table")
            continue
        allowed = TABLE[unit] if unit else row(-1)
        for line, name in imports_of(module, path):
            top = name.split(".")[0]
            if top == "retool":
                imported = unit_of(name)
                # The package itself holds nothing but its version.
                if imported not in ("", "__version__", unit) and imported not in allowed.units:
                    faults.append(f"{path.relative_to(package)}:{line}: {unit or 'retool'} imports {name}")
            elif top not in sys.stdlib_module_names and top not in allowed.packages:
                faults.append(f"{path.relative_to(package)}:{line}: {unit or 'retool'} imports the package {name}")
    return faults


def test_the_package_keeps_to_the_table() -> None:
    assert faults_of(PACKAGE) == []


def test_the_table_itself_points_downwards() -> None:
    """No row may allow a higher layer, and no two units may allow each other."""
    for unit, allowed in TABLE.items():
        for other in allowed.units - {unit}:
            assert TABLE[other].layer <= allowed.layer, (unit, other)
            assert unit not in TABLE[other].units, (unit, other)


def test_the_page_shows_the_same_table() -> None:
    """docs/architecture.md names every module that is there, in its layer, and none that is not."""
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = {unit: int(layer) for layer, unit in re.findall(r"^\| (\d) \| `(\w+)` \|", page, re.MULTILINE)}
    there = {unit_of(module) for module, _ in modules_of(PACKAGE)} - {""}
    assert shown == {unit: TABLE[unit].layer for unit in there}


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("types.py", "import retool.rl", "types imports retool.rl"),
        ("rollout.py", "from retool.engine.kv import Cache", "rollout imports retool.engine.kv"),
        ("rollout.py", "import torch", "rollout imports the package torch"),
        ("rollout.py", "def f():\n    from torch import nn", "rollout imports the package torch"),
        ("rollout.py", "from retool import engine", "rollout imports retool.engine"),
        ("rollout.py", "from . import engine", "rollout imports retool.engine"),
        ("store.py", "def f():\n    from .rl import run", "store imports retool.rl"),
        ("engine/kv.py", "from ..rl import run", "engine imports retool.rl"),
        ("engine/__init__.py", "from ..rl import run", "engine imports retool.rl"),
        ("algo/losses.py", "import importlib\nimportlib.import_module('retool.engine')", "algo imports retool.engine"),
        ("report/page.py", "import retool.rollout as r", "report imports retool.rollout"),
        ("rl.py", "import retool.cluster", "rl imports retool.cluster"),
        ("novel.py", "", "retool.novel has no row in the table"),
        ("__init__.py", "import numpy", "retool imports the package numpy"),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, source: str, fault: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    faults = faults_of(tmp_path)
    assert len(faults) == 1
    assert fault in faults[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("rollout.py", "import asyncio\nfrom retool.types import Task\nfrom . import grading"),
        (
            "engine/kv.py",
            "import torch\nfrom .attention import attend\nfrom ..types import Task\nfrom ..algo import losses",
        ),
        ("cli.py", "def f():\n    import retool.quickstart"),
        ("store.py", "from retool import __version__"),
    ],
)
def test_a_right_import_is_left_alone(tmp_path: Path, file: str, source: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source)
    assert faults_of(tmp_path) == []


def test_torch_is_not_loaded_where_it_is_not_wanted() -> None:
    """In a fresh interpreter: what a module loads includes what its imports load."""
    program = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module('retool.' + name)\n"
        "    if 'torch' in sys.modules: sys.exit('retool.' + name + ' loads torch')\n"
    )
    modules = [*NO_TORCH, "data", "rollout", "cli"]
    found = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retool.cli import Job, main
from retool.config import Recipe, make_recipe
from retool.errors import InvariantError, SandboxBroken, UserError
from tests.fakes import hear_ctrl_c

RETOOL = [sys.executable, "-m", "retool.cli"]


class Jobs:
    """In place of the real jobs: remembers what it was asked to run."""

    def __init__(self, raises: BaseException | None = None) -> None:
        self.ran: list[tuple[str, Recipe, dict[str, Any]]] = []
        self.raises = raises

    def __call__(self, name: str) -> Job:
        def run(recipe: Recipe, **options: Any) -> dict[str, Any]:
            self.ran.append((name, recipe, options))
            if self.raises is not None:
                raise self.raises
            return {"answer": 42}

        return run


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    path = tmp_path / "mine.toml"
    path.write_text('[run]\nname = "mine"\n[rl]\nsteps = 3\nprompts = 4\ngroup_size = 2\n')
    return str(path)


@pytest.mark.parametrize(
    "verb",
    [[], ["rl"], ["sft"], ["eval"], ["quickstart"], ["doctor"], ["report"], ["sandbox", "run"], ["sandbox", "serve"]],
)
def test_help_loads_nothing_heavy(verb: list[str]) -> None:
    program = (
        "import sys; from retool.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'pydantic', 'rich', 'numpy', 'aiohttp'} & set(sys.modules);"
        "sys.exit(code or ', '.join(heavy) or 0)"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, *verb, "--help"], capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.startswith("Usage: retool")


@pytest.mark.parametrize("arguments", [[], ["sandbox"]])
def test_a_bare_command_shows_its_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize(("verb", "job"), [("sft", "sft"), ("rl", "rl"), ("eval", "evaluate")])
def test_a_job_gets_its_recipe(verb: str, job: str, recipe_file: str) -> None:
    jobs = Jobs()
    assert main([verb, recipe_file, "rl.steps=9", "--quiet", "run.seed=5"], load=jobs) == 0
    [(name, recipe, options)] = jobs.ran
    assert name == job
    assert (recipe.run.name, recipe.rl.steps, recipe.run.seed) == ("mine", 9, 5)
    assert list(options) == ["progress"]
    assert options["progress"].quiet


def test_eval_takes_a_model(recipe_file: str) -> None:
    jobs = Jobs()
    assert main(["eval", recipe_file, "model.path=other", "--model", 'odd "name"\\ü'], load=jobs) == 0
    assert jobs.ran[0][1].model.path == 'odd "name"\\ü'


def test_quickstart_runs_the_shipped_recipe() -> None:
    jobs = Jobs()
    assert main(["quickstart", "rl.steps=2", "--with-control", "--seed", "7", "--out", "2026"], load=jobs) == 0
    [(name, recipe, options)] = jobs.ran
    assert name == "quickstart"
    assert (recipe.rl.steps, recipe.run.seed, recipe.run.out) == (2, 7, "2026")
    assert (options["from_scratch"], options["with_control"], options["progress"].quiet) == (False, True, False)


@pytest.mark.parametrize(
    ("verb", "says"),
    [
        ("sft", ["# steps          as many as 1 × the data need, 32 conversations each"]),
        ("rl", ["# steps                   3, 8 trajectories each (4 tasks × 2)", "# optimiser steps a step  2\n"]),
        ("eval", ["# samples     at most 480 problems × 1\n"]),
    ],
)
def test_a_dry_run_prints_a_recipe_and_starts_nothing(
    verb: str, says: list[str], recipe_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = Jobs()
    assert main([verb, recipe_file, "rl.minibatch_prompts=2", "run.out=o", "--dry-run"], load=jobs) == 0
    assert jobs.ran == []
    out = capsys.readouterr().out
    for text in [*says, "o/mine\n", "# fits this machine ("]:
        assert text in out
    recipe = make_recipe(tomllib.loads(out))
    assert (recipe.rl.steps, recipe.rl.minibatch_prompts, recipe.run.name) == (3, 2, "mine")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rl", "none.toml"], "recipe 'none.toml': no such file"),
        (["rl"], "Missing argument 'RECIPE'. See 'retool rl --help'."),
        (["zzz"], "No such command 'zzz'. See 'retool --help'."),
        (["rl", "FILE", "--zzz"], "No such option '--zzz'. See 'retool rl --help'."),
        (["rl", "FILE", "rl.step=3"], "did you mean 'steps'?"),
        (["rl", "FILE", "rl.steps"], "write section.key=value"),
        (["rl", "FILE", "--engine", "mars"], "'mars' is not one of 'local', 'verl'"),
        (["sandbox", "run", "none.py"], "FILE = 'none.py': No such file or directory; give the path"),
        (["sandbox", "run", "FILE", "--timeout", "0"], "sandbox.timeout_s = 0.0: input should be greater than 0"),
        (["sandbox", "run", "FILE", "--timeout", "nan"], "sandbox.timeout_s = nan: "),
        (["sandbox", "run", "FILE", "--memory-mb", "1"], "sandbox.memory_mb = 1: "),
        (["report", "no/such/run"], "RUN = 'no/such/run': there is no such folder"),
    ],
)
def test_a_users_mistake_is_one_line(
    arguments: list[str], says: str, recipe_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([recipe_file if a == "FILE" else a for a in arguments], load=Jobs()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("retool: error: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err


@pytest.mark.parametrize(
    ("error", "code"), [(UserError("a mistake,\nin two lines"), 2), (SandboxBroken("a mistake, in two lines"), 1)]
)
def test_an_error_of_a_job_is_one_line(
    error: Exception, code: int, recipe_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rl", recipe_file], load=Jobs(error)) == code
    assert capsys.readouterr().err == "retool: error: a mistake, in two lines\n"


@pytest.mark.parametrize("error", [InvariantError("a bug"), ZeroDivisionError()])
def test_a_bug_is_not_hidden(error: Exception, recipe_file: str) -> None:
    with pytest.raises(type(error)):
        main(["rl", recipe_file], load=Jobs(error))


def test_the_traceback_can_be_asked_for() -> None:
    found = subprocess.run(
        [*RETOOL, "rl", "none.toml"],
        env={**os.environ, "RETOOL_TRACEBACK": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode != 0
    assert "Traceback" in found.stderr and "recipe 'none.toml'" in found.stderr


BUSY = {
    "asyncio": "asyncio.run(sleep_in_a_loop())",
    "a busy task": "asyncio.run(wait_for(work()))",
    "threads": "started(); time.sleep(60)",
}
JOB = """
import asyncio, gc, signal, sys, time
from retool.cli import main
if {ignored}: signal.signal(signal.SIGINT, signal.SIG_IGN)
def started(): print("started", flush=True)
async def sleep_in_a_loop():
    started()
    await asyncio.sleep(60)
async def work():
    started()
    while True:
        time.sleep(0.001)
        await asyncio.sleep(0)
async def wait_for(work):
    task = asyncio.create_task(work)
    await asyncio.get_running_loop().create_future()
def load(name):
    def run(recipe, *, progress):
        try:
            {busy}
        finally:
            print("cleaned up", flush=True)
    return run
code = main(["rl", sys.argv[1]], load=load)
gc.collect()  # what asyncio has to say of a lost task, it says when the task goes
sys.exit(code)
"""


def signal_job(program: str, recipe_file: str, signum: signal.Signals) -> tuple[int, str, str]:
    """Start the program, send it the signal once it has started, and answer its exit code and what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, recipe_file],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_ctrl_c,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signum)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize("busy", BUSY)
@pytest.mark.parametrize(
    ("signum", "ignored", "code", "says"),
    [
        (signal.SIGINT, False, 130, "retool: interrupted\n"),
        (signal.SIGTERM, False, 143, "retool: terminated\n"),
        (signal.SIGTERM, True, 143, "retool: terminated\n"),
    ],
)
def test_a_signal_ends_a_job_cleanly(
    busy: str, signum: signal.Signals, ignored: bool, code: int, says: str, recipe_file: str
) -> None:
    program = JOB.format(busy=BUSY[busy], ignored=ignored)
    ended = signal_job(program, recipe_file, signum)
    assert ended == (code, "cleaned up\n", says)


def test_an_ignored_ctrl_c_stays_ignored(recipe_file: str) -> None:
    program = JOB.format(busy="started(); time.sleep(1)", ignored=True)
    ended = signal_job(program, recipe_file, signal.SIGINT)
    assert ended == (0, "cleaned up\n", "")


def test_sigterm_is_left_as_it_was(recipe_file: str) -> None:
    before = signal.getsignal(signal.SIGTERM)
    main(["rl", recipe_file], load=Jobs())
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], str]:
    def write(code: str) -> str:
        (tmp_path / "program.py").write_text(code)
        return str(tmp_path / "program.py")

    return write


def test_sandbox_run_prints_what_the_program_printed(
    program: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    code = "import sys\nprint('out\\n\\tü')\nprint('err', file=sys.stderr)"
    assert main(["sandbox", "run", program(code)]) == 0
    assert tuple(capsys.readouterr()) == ("out\n\tü\n", "err\n")


def test_sandbox_run_says_how_a_program_ended(
    program: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sandbox", "run", program("print('before')\nraise SystemExit(3)")]) == 1
    assert tuple(capsys.readouterr()) == ("before\n", "retool: the program ended with error, exit code 3\n")


def test_sandbox_run_keeps_to_its_timeout(program: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sandbox", "run", program("while True: pass"), "--timeout", "0.5", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["status"], found["exit_code"]) == ("timeout", None)


def test_sandbox_run_keeps_to_its_memory(program: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sandbox", "run", program("print(len(bytearray(600 << 20)))"), "--memory-mb", "200", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["status"] == "memory"


def test_sandbox_run_reads_standard_input_and_prints_one_line_of_json() -> None:
    found = subprocess.run(
        [*RETOOL, "sandbox", "run", "-", "--json"],
        input="print('a')\nprint('ü')",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.count("\n") == 1
    result = json.loads(found.stdout)
    assert set(result) == {"status", "stdout", "stderr", "exit_code", "duration_s", "truncated", "tier"}
    assert (result["status"], result["stdout"], result["exit_code"], result["truncated"]) == ("ok", "a\nü\n", 0, False)


def test_a_program_that_is_not_utf8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin.py").write_bytes(b"print('\xfc')")
    assert main(["sandbox", "run", str(tmp_path / "latin.py")]) == 2
    assert "not UTF-8" in capsys.readouterr().err

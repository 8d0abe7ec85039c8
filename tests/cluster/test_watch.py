"""Watching verl: its metrics and its errors as the run folder and the user get them. In verl's place stands a program
of a few lines: ``Watch`` gives its child an environment, and a ``sitecustomize`` there runs before anything else."""

from __future__ import annotations

import importlib.util
import json
import math
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from retool.cluster.option import Job
from retool.cluster.options import command_of
from retool.cluster.process import last_error
from retool.cluster.watch import Lines, Watch, numbers_of
from retool.config import HealthConfig, make_recipe
from retool.errors import HealthError, InfraError, UserError
from retool.health import Monitor
from retool.progress import Progress
from retool.store import RunFolder

PRELUDE = '''
import json, os, sys, time
if "retool.cluster.main" in sys.orig_argv:
    folder, job, *overrides = sys.orig_argv[sys.orig_argv.index("retool.cluster.main") + 1 :]
    def log(step, **data):
        """As verl's file logger writes; names have slashes, for which two underscores stand here."""
        line = json.dumps({"step": step, "data": {name.replace("__", "/"): x for name, x in data.items()}})
        with open(os.environ["VERL_FILE_LOGGER_PATH"], "a") as file:
            file.write(line + "\\n")
    def told(kind, message):
        with open(os.path.join(folder, "verl", "error.json"), "w") as file:
            json.dump({"kind": kind, "message": message}, file)
    def run():
BODY
    code = 0
    try:
        run()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
'''


def has_verl() -> bool:
    """Whether the package is installed; the folder ``tests/verl`` is none."""
    spec = importlib.util.find_spec("verl")
    return spec is not None and spec.origin is not None


class Heard(Progress):
    """Keeps its lines."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def line(self, text: str = "") -> None:
        self.lines.append(text)


def fake_verl(place: Path, body: str) -> dict[str, str]:
    """The environment in which the launcher's child is a program of its own."""
    place.mkdir(exist_ok=True)
    program = PRELUDE.replace("BODY", textwrap.indent(textwrap.dedent(body), " " * 8))
    (place / "sitecustomize.py").write_text(program)
    return {"PYTHONPATH": str(place)}


class Case:
    """A run folder, and what a start of verl in it left."""

    def __init__(self, tmp_path: Path, job: str = "rl", **sections: Any) -> None:
        recipe = make_recipe({"run": {"out": str(tmp_path), "name": "x"}, **sections})
        self.folder = RunFolder(tmp_path / "x")
        self.folder.write_config(recipe)
        self.job = Job(job, recipe, self.folder.path)
        self.job.state.mkdir(exist_ok=True)
        self.progress = Heard()
        self._place = tmp_path / "fake"

    def run(self, body: str, *, done: int = 0, total: int = 3, overrides: tuple[str, ...] = ("a.b=1",)) -> None:
        watch = Watch(self.job, self.folder, done, total, self.progress)
        watch.run(overrides, fake_verl(self._place, body))

    @property
    def log(self) -> str:
        return (self.job.state / "log.txt").read_text()

    @property
    def last_line(self) -> str:
        return self.progress.lines[-1]


def rows(case: Case) -> list[dict[str, float]]:
    return case.folder.metrics()


# --- the file that grows ----------------------------------------------------------------------------------------------


def test_only_whole_lines_and_each_once(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = Lines(path)
    assert list(lines.new()) == []  # it is not there yet
    path.write_bytes(b'{"a": 1}\n{"b"')
    assert list(lines.new()) == ['{"a": 1}']
    assert list(lines.new()) == []
    with path.open("ab") as file:
        file.write(b': "\xc3')
    assert list(lines.new()) == []  # torn in the middle of a letter
    with path.open("ab") as file:
        file.write(b'\xbc"}\n\n{"c": 3}\n')
    assert list(lines.new()) == ['{"b": "ü"}', "", '{"c": 3}']
    assert list(lines.new()) == []


def test_a_file_without_a_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    assert list(Lines(tmp_path / "x").new()) == []


def test_numbers_alone_are_metrics() -> None:
    data = {"a": 1, "b": 2.5, "c": "text", "d": None, "e": math.nan, "f": math.inf, "g": [1], "h": -0.0}
    assert numbers_of(data) == {"a": 1.0, "b": 2.5, "h": 0.0}
    assert all(type(value) is float for value in numbers_of(data).values())


def test_a_gradient_that_is_not_finite_is_a_skipped_update() -> None:
    """verl prints that and logs null; the checks of a run's health know it by the local engine's name."""
    monitor = Monitor(HealthConfig(max_skipped=2), compares_groups=True)
    assert numbers_of({"actor/grad_norm": 0.5}) == {"actor/grad_norm": 0.5, "actor/skipped": 0.0}
    fatal = []
    for step, norm in enumerate([None, 0.5, None, None], start=1):  # two in a row are too many
        found = numbers_of({"actor/grad_norm": norm})
        assert found["actor/skipped"] == (norm is None)
        alarms = monitor.check(step, found)
        assert ("not_finite" in [alarm.name for alarm in alarms]) == (norm is None)
        fatal.append(monitor.fatal(alarms) is not None)
    assert fatal == [False, False, False, True]


RAY = """\
(TaskRunner pid=811) INFO:2026-11-26 17:02:11:Initial validation
\x1b[36m(Runner pid=811)\x1b[0m Training Progress:   0%|          | 0/3 [00:00<?, ?it/s]
Traceback (most recent call last):
  File "/usr/lib/python3.11/runpy.py", line 198, in _run_module_as_main
  File "/x/verl/trainer/main_ppo.py", line 97, in run_ppo
    ray.get(runner.run.remote(config))
ray.exceptions.RayTaskError(AssertionError): \x1b[36mray::Runner.run()\x1b[39m (pid=811, ip=10.0.0.1, actor_id=4a)
  File "/x/verl/trainer/ppo/ray_trainer.py", line 410, in fit
    assert config.n > 1, "only support equal chunk"
AssertionError: only support equal chunk. Got size of DataProto 6
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        pytest.param(RAY, "AssertionError: only support equal chunk. Got size of DataProto 6", id="ray"),
        pytest.param(
            RAY.rpartition("AssertionError: only")[0] + "AssertionError\n",
            "ray.exceptions.RayTaskError(AssertionError): ray::Runner.run() (pid=811, ip=10.0.0.1, actor_id=4a)",
            id="an exception without words",
        ),
        pytest.param("(Runner pid=1) ValueError: bad\n", "ValueError: bad", id="worker's prefix"),
        pytest.param(
            "\x1b[36m(Worker pid=77, ip=10.0.0.2)\x1b[0m torch.OutOfMemoryError: CUDA out of \x1b[31mmemory\x1b[0m\n"
            "\x1b[36m(Worker pid=77, ip=10.0.0.2)\x1b[0m   see the manual [repeated 7x across cluster]\n",
            "torch.OutOfMemoryError: CUDA out of memory",
            id="colours",
        ),
        pytest.param(
            "omegaconf.errors.ConfigAttributeError: Missing key n\n    full_key: a.n\n    object_type=dict\n",
            "omegaconf.errors.ConfigAttributeError: Missing key n",
            id="a message of several lines",
        ),
        pytest.param(
            "hydra.errors.ConfigCompositionException: no\nKilled\n",
            "hydra.errors.ConfigCompositionException: no",
            id="exception, then a shell's word",
        ),
        pytest.param("[rank0]: RuntimeError: NCCL timed out\n", "RuntimeError: NCCL timed out", id="torchrun's prefix"),
        pytest.param("step 1\nno Errors so far\nERROR 5\n", "", id="no exception"),
        pytest.param("", "", id="nothing"),
    ],
)
def test_the_last_exception_of_a_log(text: str, found: str) -> None:
    assert last_error(text) == found


def test_a_long_exception_is_cut() -> None:
    assert len(last_error("ValueError: " + "x" * 5000)) == 300


# --- a run ------------------------------------------------------------------------------------------------------------


def test_what_verl_logs_becomes_the_runs_metrics(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.run(
        """
        print(json.dumps([job, overrides, os.path.realpath(folder)]))
        log(0, **{"val-core__world__acc__mean@1": 0.25})
        log(1, acc__mean=0.5, text="no number", actor__entropy=float("nan"))
        log(2, acc__mean=0.75, num_turns__mean=3)
        log(3, acc__mean=1.0)
        """,
        overrides=("a.b=1", "c=[x, y]"),
    )
    assert rows(case) == [
        {"step": 0, "val-core/world/acc/mean@1": 0.25},
        {"step": 1, "acc/mean": 0.5},
        {"step": 2, "acc/mean": 0.75, "num_turns/mean": 3.0},
        {"step": 3, "acc/mean": 1.0},
    ]
    assert json.loads(case.log) == ["rl", ["a.b=1", "c=[x, y]"], str(case.folder.path)]
    assert case.progress.lines[0] == f"verl starts; what it prints is in {case.job.state / 'log.txt'}"
    assert case.last_line.startswith("✓ RL: ") and "3/3" in case.last_line and "accuracy 1" in case.last_line


def test_metrics_come_while_verl_runs(tmp_path: Path) -> None:
    """The child waits until it sees its own first step in the run's metrics."""
    case = Case(tmp_path)
    case.run(
        """
        log(1, acc__mean=0.5)
        while not os.path.getsize(os.path.join(folder, "metrics.jsonl")):
            time.sleep(0.02)
        log(2, acc__mean=0.75)
        """
    )
    assert [row["step"] for row in rows(case)] == [1, 2]


def test_the_command_is_the_one_that_is_shown() -> None:
    job = Job("rl", make_recipe({}), Path("/runs/x"))
    assert command_of(job, ["a=1"]) == ["-m", "retool.cluster.main", "/runs/x", "rl", "a=1"]


def test_a_run_that_goes_on_does_not_log_the_done_step_again(tmp_path: Path) -> None:
    """verl validates before its first step, whose number is then that of the checkpoint."""
    case = Case(tmp_path)
    case.run("log(1, acc__mean=0.1); log(2, acc__mean=0.2, **{'val-core__w__acc__mean@1': 0.3})", total=2)
    case.run(
        """
        log(2, **{"val-core__w__acc__mean@1": 0.31})
        log(3, acc__mean=0.3)
        log(4, acc__mean=0.4)
        """,
        done=2,
        total=4,
    )
    assert [(row["step"], row.get("acc/mean")) for row in rows(case)] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert rows(case)[1]["val-core/w/acc/mean@1"] == 0.3
    assert "4/4" in case.last_line


def test_sfts_two_lines_of_a_step_become_one(tmp_path: Path) -> None:
    case = Case(tmp_path, "sft")
    case.run(
        """
        log(1, train__loss=3.0)
        log(2, train__loss=2.0)
        log(2, val__loss=2.5)
        log(3, train__loss=1.0)
        time.sleep(0.5)
        log(3, val__loss=1.5)
        """
    )
    assert rows(case) == [
        {"step": 1, "train/loss": 3.0},
        {"step": 2, "train/loss": 2.0, "val/loss": 2.5},
        {"step": 3, "train/loss": 1.0, "val/loss": 1.5},
    ]
    assert "3/3" in case.last_line and "loss 1.5" in case.last_line


def test_sft_goes_on_after_its_checkpoint(tmp_path: Path) -> None:
    case = Case(tmp_path, "sft")
    case.run("log(2, val__loss=9.0); log(3, train__loss=1.0)", done=2)
    assert rows(case) == [{"step": 3, "train/loss": 1.0}]
    assert "3/3" in case.last_line


def test_sft_is_not_judged_by_rls_alarms(tmp_path: Path) -> None:
    case = Case(tmp_path, "sft", health={"stop_on": ["gradient_spike"], "window": 1})
    case.run("log(1, actor__grad_norm=1.0); log(2, actor__grad_norm=1000.0)")
    assert [sorted(row) for row in rows(case)] == [["actor/grad_norm", "actor/skipped", "step"]] * 2


def test_an_evaluation_has_no_steps(tmp_path: Path) -> None:
    case = Case(tmp_path, "evaluate")
    case.run("log(0, **{'val-core__w__acc__mean@1': 0.5})", total=1)
    assert rows(case) == []
    assert case.last_line.startswith("✓ evaluation: ")


# --- its health -------------------------------------------------------------------------------------------------------

LOST = "infra__trajectories=5, rollout__trajectories=5"


def test_an_alarm_is_shown_and_logged(tmp_path: Path) -> None:
    case = Case(tmp_path)
    case.run(f"log(1, acc__mean=0.5); log(2, {LOST}); log(3, {LOST})")
    alarms = [line for line in case.progress.lines if line.startswith("! ")]
    assert len(alarms) == 1  # one that stays on is not repeated
    assert alarms[0].startswith("! infra at step 2: share of trajectories lost 0.5 over 1 step")
    assert [row.get("health/infra") for row in rows(case)] == [None, 1.0, None]


def test_a_validation_alone_is_not_judged(tmp_path: Path) -> None:
    case = Case(tmp_path, health={"stop_on": ["infra"]})
    case.run(f"log(0, {LOST})")
    assert "health/infra" not in rows(case)[0]


def test_an_alarm_that_ends_the_run(tmp_path: Path) -> None:
    """verl is ended: it would go on for a minute."""
    case = Case(tmp_path, health={"stop_on": ["infra"]})
    started = time.monotonic()
    with pytest.raises(HealthError) as error:
        case.run(f"log(1, acc__mean=0.5); log(2, {LOST}); sys.stdin.buffer.read(); print('told to end')")
    assert time.monotonic() - started < 20
    assert str(error.value).startswith("infra at step 2: ")
    assert str(error.value).endswith(f". The run ends here; its state is in {case.job.state}")
    assert [row["step"] for row in rows(case)] == [1, 2]  # the step that ended it is on record
    assert rows(case)[-1]["health/infra"] == 1.0
    assert case.log == "told to end\n"
    assert case.last_line.startswith("✗ RL: stopped after ")


def test_alarms_remember_what_came_before_the_checkpoint(tmp_path: Path) -> None:
    """The mean over the window is of the earlier start's steps too: without them 0.4 alone would ring."""
    health = {"stop_on": ["cut_short"], "cut_high": 0.3, "window": 3}
    case = Case(tmp_path, health=health)
    case.run("log(1, response_length__clip_ratio=0.1); log(2, response_length__clip_ratio=0.1)", total=2)
    case.run("log(3, response_length__clip_ratio=0.4)", done=2)
    assert [row["step"] for row in rows(case)] == [1, 2, 3]
    with pytest.raises(HealthError, match="cut_short at step 1"):
        Case(tmp_path / "fresh", health=health).run("log(1, response_length__clip_ratio=0.4)")


# --- its errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "error"), [("user", UserError), ("infra", InfraError)])
def test_what_the_child_tells_is_told_on(kind: str, error: type[Exception], tmp_path: Path) -> None:
    case = Case(tmp_path)
    with pytest.raises(error) as raised:
        case.run(f"log(1, acc__mean=0.5); told({kind!r}, 'rl.x = 3: no'); print('KeyError: 5'); sys.exit(2)")
    assert str(raised.value) == "rl.x = 3: no"
    assert type(raised.value) is error
    assert [row["step"] for row in rows(case)] == [1]


def test_a_crash_is_one_line_with_the_last_exception(tmp_path: Path) -> None:
    case = Case(tmp_path)
    with pytest.raises(InfraError) as raised:
        case.run("print('RuntimeError: early'); log(1, acc__mean=0.5); raise ValueError('a shape\\nof 3')")
    assert str(raised.value) == (
        f"verl ended with exit code 1: ValueError: a shape. What it printed is in {case.job.state / 'log.txt'}; once "
        "that is mended, the same command goes on from what was saved"
    )
    assert "Traceback" in case.log
    assert [row["step"] for row in rows(case)] == [1]
    assert case.last_line.startswith("✗ RL: stopped after ")


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", -9)])
def test_a_crash_without_a_word(ending: str, code: int, tmp_path: Path) -> None:
    with pytest.raises(InfraError, match=rf"^verl ended with exit code {code}\. What it printed"):
        Case(tmp_path).run(ending)


def test_an_earlier_starts_errors_are_not_told_again(tmp_path: Path) -> None:
    case = Case(tmp_path)
    with pytest.raises(UserError):
        case.run("told('user', 'old'); print('ValueError: old'); sys.exit(2)")
    with pytest.raises(InfraError) as raised:
        case.run("sys.exit(3)")
    assert "old" not in str(raised.value)
    case.run("log(1, acc__mean=0.5)")
    assert case.log.count("ValueError: old") == 1  # the log itself is kept


def test_the_same_step_of_an_earlier_start_is_not_counted_twice(tmp_path: Path) -> None:
    case = Case(tmp_path)
    with pytest.raises(InfraError):
        case.run("log(1, acc__mean=0.5); sys.exit(3)")
    case.folder.rewind(0)  # as the launcher does
    case.run("log(1, acc__mean=0.6)", total=1)
    assert rows(case) == [{"step": 1, "acc/mean": 0.6}]


def test_the_childs_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, and what is added to it."""
    monkeypatch.setenv("OF_THE_CALLER", "kept")
    case = Case(tmp_path)
    watch = Watch(case.job, case.folder, 0, 1, case.progress)
    fake = fake_verl(tmp_path / "fake", "print(os.environ['OF_THE_CALLER'], os.environ['ADDED'])")
    watch.run([], {**fake, "ADDED": "too"})
    assert case.log == "kept too\n"


@pytest.mark.skipif(has_verl(), reason="verl is installed, and would start")
def test_the_real_child_without_verl_says_so(tmp_path: Path) -> None:
    """No fake here: ``python -m retool.cluster.main`` itself."""
    case = Case(tmp_path)
    watch = Watch(case.job, case.folder, 0, 1, case.progress)
    with pytest.raises(InfraError, match=r"exit code 1: ModuleNotFoundError: No module named 'verl'\."):
        watch.run([], {})


def test_the_real_child_tells_a_broken_recipe(tmp_path: Path) -> None:
    case = Case(tmp_path)
    (case.folder.path / "config.toml").write_text("[rl]\nstep = 3\n")
    watch = Watch(case.job, case.folder, 0, 1, case.progress)
    with pytest.raises(UserError, match=r"^rl.step = 3: there is no such setting; did you mean 'steps'\?$"):
        watch.run([], {})
    told = json.loads((case.job.state / "error.json").read_text())
    assert told["kind"] == "user"

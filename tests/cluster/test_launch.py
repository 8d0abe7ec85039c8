"""The launcher: what must be in order before verl starts, told in one line; what it starts, and what it keeps of it.

In verl's place stand packages of a few lines that are put before the others: enough for the launcher to find verl of a
version, to compose options, and to start a child that saves and logs as verl does (``test_watch.PRELUDE``)."""

from __future__ import annotations

import json
import os
import socket
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from retool.cli import main
from retool.cluster.data import task_of
from retool.cluster.launch import check_address, check_model
from retool.cluster.option import Job
from retool.cluster.options import command_of, overrides_of
from retool.cluster.state import LATEST, MARK, export, logged_step, resume_point, saved_step, whole_steps
from retool.config import Recipe, make_recipe, recipe_toml
from retool.data.sources import open_source
from retool.errors import ConfigError, InfraError
from retool.store import RunFolder
from retool.store.resume import RunLock
from tests.cluster.test_watch import PRELUDE, has_verl

TINY = (
    '[run]\nname = "x"\nout = "OUT"\n[rl]\nsteps = 2\nprompts = 4\ngroup_size = 2\n[sft]\nsteps = 2\nbatch_size = 8\n'
)


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def recipe_file(tmp_path: Path) -> str:
    (tmp_path / "r.toml").write_text(TINY.replace("OUT", str(tmp_path / "runs")))
    return str(tmp_path / "r.toml")


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The exit code, what was printed, and what was said on standard error."""
    code = main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def one_line(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """What is said of a mistake: one line, and nothing else."""
    found, out, err = ask(capsys, *arguments, "--quiet")
    assert (found, out) == (code, ""), err
    assert err.startswith("retool: error: ") and err.count("\n") == 1
    return err.removeprefix("retool: error: ").rstrip("\n")


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def silent() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def at(address: str) -> Recipe:
    return make_recipe({"cluster": {"address": address}})


def test_an_address_that_answers(listening: int, silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_address(at(f"127.0.0.1:{listening}"))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent}")
    check_address(at(f"127.0.0.1:{listening}"))  # the recipe's comes first


def test_an_address_at_which_nothing_listens(silent: int) -> None:
    with pytest.raises(ConfigError) as error:
        check_address(at(f"127.0.0.1:{silent}"))
    assert str(error.value) == (
        f"cluster.address = '127.0.0.1:{silent}': no Ray answers there (Connection refused); start one with "
        "'ray start --head', or leave it empty for a Ray of the run's own"
    )


def test_the_environments_address(silent: int, listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent}")
    with pytest.raises(ConfigError, match=rf"^RAY_ADDRESS = '127\.0\.0\.1:{silent}': no Ray answers there"):
        check_address(at(""))
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening}")
    check_address(at(""))


def test_a_host_that_nobody_knows() -> None:
    with pytest.raises(ConfigError, match=r"^cluster.address = 'no-host.invalid:6379': no Ray answers there \("):
        check_address(at("no-host.invalid:6379"))


@pytest.mark.parametrize("address", ["", "auto"])
def test_what_only_ray_can_find(address: str) -> None:
    check_address(at(address))


def test_several_nodes_need_a_ray_that_runs(listening: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe({"cluster": {"nodes": 2}})
    with pytest.raises(ConfigError, match=r"^cluster\.nodes = 2: .*give cluster\.address = "):
        check_address(recipe)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening}")
    check_address(recipe)
    monkeypatch.delenv("RAY_ADDRESS")
    check_address(make_recipe({"cluster": {"nodes": 2, "address": "auto"}}))


def test_an_address_of_ipv6() -> None:
    try:
        server = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with server:
        port = server.getsockname()[1]
        check_address(at(f"[::1]:{port}"))
    with pytest.raises(ConfigError, match=r"no Ray answers there"):
        check_address(at(f"[::1]:{port}"))


def model_folder(path: Path, *files: str) -> Recipe:
    path.mkdir()
    for file in files:
        (path / file).write_text("{}")
    return make_recipe({"model": {"path": str(path)}})


def test_a_whole_models_folder(tmp_path: Path) -> None:
    check_model(model_folder(tmp_path / "a", "config.json", "model-00001-of-00002.safetensors"))
    check_model(model_folder(tmp_path / "b", "config.json", "pytorch_model.bin"))
    check_model(Recipe())  # nano
    check_model(make_recipe({"model": {"path": "Qwen/Qwen2.5-7B"}}))  # not asked for here


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        ((), "config.json"),
        (("model.safetensors",), "config.json"),
        (("config.json", "tokenizer.json"), r"weights (*.safetensors)"),
    ],
)
def test_a_folder_that_is_no_whole_model(files: tuple[str, ...], missing: str, tmp_path: Path) -> None:
    recipe = model_folder(tmp_path / "m", *files)
    with pytest.raises(ConfigError) as error:
        check_model(recipe)
    assert str(error.value) == (f"model.path = '{tmp_path}/m': the folder has no {missing}; give a whole model's")


@pytest.mark.parametrize("path", ["./no/such", "runs/x/checkpoints/step_000004", "nan0", "/", "~/model"])
def test_neither_a_folder_nor_a_hub_name(path: str) -> None:
    with pytest.raises(ConfigError, match=r"^model\.path = '"):
        check_model(make_recipe({"model": {"path": path}}))


@pytest.mark.parametrize("path", ["./model", "../model"])
def test_a_path_beside_us_is_no_hub_name(path: str) -> None:
    """The tokenizer's loader complains later, of something else."""
    with pytest.raises(ConfigError, match=r"^model\.path = '"):
        check_model(make_recipe({"model": {"path": path}}))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"there is no such folder; give one, or a hub name$"):
        check_model(make_recipe({"model": {"path": str(tmp_path / "model.safetensors")}}))


@pytest.mark.parametrize(("text", "step"), [("12", 12), ("12\n", 12), ("", 0), ("twelve", 0), (None, 0)])
def test_the_last_step_that_was_saved(text: str | None, step: int, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / LATEST).write_text(text)
    assert saved_step(tmp_path) == step


def resumes(
    tmp_path: Path, latest: int, logged: int, saved: tuple[int, ...], *, keep: int = 2, shells: tuple[int, ...] = ()
) -> tuple[int, int, list[int], list[str]]:
    """Where a run goes on; what verl will take for its last step; the steps that it still has; what was said."""
    folder, said = RunFolder(tmp_path / "x"), list[str]()
    job = Job("rl", make_recipe({"run": {"keep_checkpoints": keep}}), tmp_path / "x")
    job.state.mkdir()
    if latest:
        (job.state / LATEST).write_text(str(latest))
    for step in saved:
        (job.state / f"global_step_{step}" / "actor").mkdir(parents=True)
        (job.state / f"global_step_{step}" / "actor" / MARK).touch()
    for step in shells:  # what verl's own rotation leaves
        (job.state / f"global_step_{step}").mkdir()
    (job.state / "global_step_notes").mkdir()
    tracker = folder.tracker()
    for step in range(logged + 1):
        tracker.log(step, {"acc/mean": 0.5})
        folder.write_step(step, [])
    tracker.close()
    found = resume_point(job, folder, said.append)
    assert (job.state / "global_step_notes").is_dir()
    return found, saved_step(job.state), sorted(whole_steps(job)), said


@pytest.mark.parametrize(
    ("latest", "logged", "saved", "found", "left"),
    [
        (0, 0, (), 0, []),
        (0, 3, (), 0, []),
        (4, 4, (2, 4), 4, [2, 4]),
        (4, 7, (2, 4), 4, [2, 4]),  # killed between two checkpoints
        (4, 3, (2, 4), 2, [2]),  # saved and not logged: done again
        (4, 2, (2, 4), 2, [2]),
        (8, 8, (2, 4, 6, 8), 8, [6, 8]),  # verl forgets what earlier starts have left
    ],
)
def test_a_step_counts_once_it_is_saved_and_logged(
    latest: int, logged: int, saved: tuple[int, ...], found: int, left: list[int], tmp_path: Path
) -> None:
    assert resumes(tmp_path, latest, logged, saved) == (found, found, left, [])


def test_a_step_without_its_trajectories_is_not_logged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "x")
    tracker = folder.tracker()
    for step in (1, 2):
        tracker.log(step, {"acc/mean": 0.5})
    tracker.close()
    folder.write_step(1, [])
    assert logged_step(Job("rl", Recipe(), folder.path), folder) == 1
    assert logged_step(Job("sft", Recipe(), folder.path), folder) == 2


@pytest.mark.parametrize(("latest", "saved", "shells"), [(4, (4,), ()), (1, (1,), ()), (60, (60,), (30,))])
def test_where_no_earlier_step_is_kept_a_gap_is_told(
    latest: int, saved: tuple[int, ...], shells: tuple[int, ...], tmp_path: Path
) -> None:
    """A folder that verl's rotation has emptied is no checkpoint."""
    found, last, left, said = resumes(tmp_path, latest, latest - 1, saved, keep=1, shells=shells)
    assert (found, last, left) == (latest, latest, list(saved))
    assert said == [f"step {latest} was saved and not logged: its metrics or trajectories are missing"]


# --- on the command line, without verl --------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["sft", "rl", "eval"])
def test_verls_options_are_for_verl(verb: str, recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = "--verl a.b=1: that is for --engine verl; leave it out, or add it"
    assert one_line(capsys, verb, recipe_file, "--verl", "a.b=1", "--verl", "c=2") == told
    assert one_line(capsys, verb, recipe_file, "--verl", "a.b=1", "--dry-run") == told


@pytest.mark.parametrize(("verb", "job"), [("sft", "sft"), ("rl", "rl"), ("eval", "evaluate")])
def test_a_dry_run_is_a_recipe_again_and_shows_what_would_run(
    verb: str, job: str, recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = ask(
        capsys, verb, recipe_file, "rl.clip_high=0.3", "--engine", "verl", "--verl", "x.y=[1,2]", "--dry-run"
    )
    assert (code, err) == (0, "")
    recipe = make_recipe(tomllib.loads(out))
    assert (recipe.rl.clip_high, recipe.rl.prompts, recipe.run.name) == (0.3, 4, "x")
    comments = [line.removeprefix("#").strip() for line in out.splitlines() if line.startswith("#")]
    what = Job(job, recipe, tmp_path / "runs" / "x")
    overrides = overrides_of(what, ["x.y=[1,2]"])
    for override in overrides:
        assert sum(comment.startswith(f"{override} ") for comment in comments) == 1, override
    assert comments[-1].startswith("python -m retool.cluster.main ")
    assert comments[-1].count("=") >= len(overrides)
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_refuses_as_the_run_would(recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    verl = ("--engine", "verl", "--dry-run")
    assert one_line(capsys, "rl", recipe_file, "run.deterministic=true", *verl).startswith("run.deterministic = true")
    told = one_line(capsys, "rl", recipe_file, "--verl", "trainer.nnodes=2", *verl)
    assert told == "--verl trainer.nnodes=2: the recipe sets that; give cluster.nodes=… instead"


@pytest.mark.skipif(has_verl(), reason="verl is installed")
@pytest.mark.parametrize("verb", ["sft", "rl", "eval"])
def test_without_verl_its_installation_is_told(
    verb: str, recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = one_line(capsys, verb, recipe_file, "--engine", "verl")
    assert told == "--engine verl: verl is not installed; pip install 'retool[verl]' -c constraints-verl.txt"
    assert not (tmp_path / "runs").exists()


def test_the_mistakes_of_a_recipe_are_told_before_verl_is_looked_for(
    recipe_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    verl = ("--engine", "verl")
    assert one_line(capsys, "rl", recipe_file, "rl.reward=zzz", *verl).startswith("rl.reward = 'zzz': give one of ")
    assert one_line(capsys, "rl", recipe_file, "rl.optim.name=muon", *verl).startswith('rl.optim.name = "muon"')
    assert one_line(capsys, "rl", recipe_file, "--verl", "n", *verl).startswith("--verl 'n': write key=value")


# --- with verl, or what stands for it ---------------------------------------------------------------------------------

HYDRA = """
from contextlib import nullcontext
from hydra.errors import HydraException
def initialize_config_dir(folder, version_base):
    return nullcontext()
def compose(name, overrides):
    for override in overrides:
        if override.startswith("no_such"):
            raise HydraException("Could not override\\n  'no_such'.")
"""
MERGER = """
if "verl.model_merger" in sys.orig_argv:
    arguments = dict(zip(sys.orig_argv[4::2], sys.orig_argv[5::2]))
    if os.path.exists(os.environ.get("MERGER_FAILS", "")):
        print("Loading\\nRuntimeError: no shard")
        os._exit(1)
    for name in ("config.json", "model.safetensors"):
        with open(os.path.join(arguments["--target_dir"], name), "w") as file:
            file.write(arguments["--local_dir"])
    os._exit(0)
"""
TRAINS = """
options = dict(override.split("=", 1) for override in overrides)
total = int(options["trainer.total_training_steps"])
latest = os.path.join(folder, "verl", "latest_checkpointed_iteration.txt")
done = int(open(latest).read()) if os.path.exists(latest) else 0
print("token", repr(os.environ.get("RETOOL_SANDBOX_TOKEN_VALUE")), "from", done)
if job == "evaluate":
    kinds = dict.fromkeys(["infra", "num_turns", "call_rate", "malformed"], 0)
    found = {"k": 1, "accuracy": 0.5, "ci95": [0.4, 0.6], "samples": 4, "problems": 4, "executions": {}, **kinds}
    with open(os.path.join(folder, "summary.json"), "w") as file:
        json.dump({"eval": found}, file)
    log(0, **{"val-core__world__acc__mean@1": 0.5})
for step in range(done + 1, 0 if job == "evaluate" else total + 1):
    if os.path.exists(os.environ.get("FAILS_AT", "") + str(step)):
        raise RuntimeError("out of luck")
    place = os.path.join(folder, "verl", f"global_step_{step}", "actor" if job == "rl" else "", "huggingface")
    os.makedirs(place)
    with open(os.path.join(place, "chat_template.jinja"), "w") as file:
        file.write("template")
    with open(latest, "w") as file:
        file.write(str(step))
    log(step, acc__mean=step / 10)
"""


@pytest.fixture
def verl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """verl 0.9.1, so to speak, here and in the children."""
    if has_verl():
        pytest.skip("the real verl is installed")
    place = tmp_path / "packages"
    body = "".join(f"        {line}\n" for line in TRAINS.strip().splitlines())
    files = {
        "verl/__init__.py": "",
        "verl-0.9.1.dist-info/METADATA": "Metadata-Version: 2.1\nName: verl\nVersion: 0.9.1\n",
        "hydra/__init__.py": HYDRA,
        "hydra/errors.py": "class HydraException(Exception): pass\n",
        "omegaconf/__init__.py": "",
        "omegaconf/errors.py": "class OmegaConfBaseException(Exception): pass\n",
        "sitecustomize.py": PRELUDE.replace("BODY\n", body) + MERGER,
    }
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    monkeypatch.delitem(sys.modules, "verl", raising=False)  # tests/verl, where a test has looked for verl
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("PYTHONPATH", str(place))
    yield place
    for name in [name for name in sys.modules if name.partition(".")[0] in ("verl", "hydra", "omegaconf")]:
        del sys.modules[name]


def run_of(tmp_path: Path) -> RunFolder:
    return RunFolder.open(tmp_path / "runs" / "x")


def test_another_version_is_refused(verl: Path, recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = verl / "verl-0.9.1.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("0.9.1", "0.8.0"))
    told = one_line(capsys, "rl", recipe_file, "--engine", "verl")
    assert told == "--engine verl: verl 0.8.0 is installed; this needs 0.9.x (constraints-verl.txt)"


@pytest.mark.usefixtures("verl")
@pytest.mark.parametrize("verb", ["sft", "rl", "eval"])
def test_mistakes_leave_no_folder(
    verb: str, recipe_file: str, silent: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, none, model = (str(tmp_path / name) for name in ("rows.jsonl", "none.jsonl", "model"))
    Path(rows).write_text('{"problem": "2+2?"}\n{"problem": "3+3?"}\n')
    Path(model).mkdir()
    mistakes = {
        "model.path = 'no/such/model': there is no such folder": ["model.path=no/such/model"],
        f"model.path = '{model}': the folder has no config.json": [f"model.path={model}"],
        f"cluster.address = '127.0.0.1:{silent}': no Ray answers there": [f"cluster.address=127.0.0.1:{silent}"],
        rows: [f"data.train={rows}", f"data.test={rows}"],
        f"{none}: no such file; give ": [f"data.train={none}", f"data.test={none}"],
        "verl's options: Could not override 'no_such'.; see docs/cluster.md": ["--verl", "no_such=1"],
    }
    for says, arguments in mistakes.items():
        told = one_line(capsys, verb, recipe_file, *arguments, "--engine", "verl")
        assert told.startswith(says), told
        assert says != rows or ("'messages'" if verb == "sft" else "'answer'") in told
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("verl")
def test_what_the_data_cannot_give(recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    context = ("rollout.max_context=20", "rollout.max_response_tokens=10")
    told = one_line(capsys, "rl", recipe_file, *context, "--engine", "verl")
    assert told == "rollout.max_context = 20: no prompt leaves room for an answer; raise it"
    told = one_line(capsys, "sft", recipe_file, "sft.steps=0", "--engine", "verl")
    assert told.startswith("sft.steps = 0: ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("verl")
def test_a_run_of_the_other_engine(recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(tomllib.loads(Path(recipe_file).read_text()))
    folder = RunFolder(tmp_path / "runs" / "x")
    folder.write_config(recipe)
    folder.write_environment(job="rl", seed=0, device="cpu")
    before = sorted(folder.path.rglob("*"))
    told = one_line(capsys, "rl", recipe_file, "--engine", "verl")
    assert told == f"run.name = 'x': {folder.path} holds a run of --engine local; choose another name"
    folder.write_environment(job="rl", seed=0, device="verl", engine="verl")
    told = one_line(capsys, "rl", recipe_file)
    assert told == f"run.name = 'x': {folder.path} holds a run of --engine verl; choose another name"
    told = one_line(capsys, "eval", recipe_file, "--engine", "verl")
    assert told == f"run.name = 'x': {folder.path} holds a run of rl; choose another name"
    told = one_line(capsys, "rl", recipe_file, "run.resume=never", "--engine", "verl")
    assert "exists already" in told
    assert sorted(folder.path.rglob("*")) == before


@pytest.mark.usefixtures("verl")
def test_one_process_at_a_time(recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = make_recipe(tomllib.loads(Path(recipe_file).read_text()))
    RunFolder(tmp_path / "runs" / "x").write_config(recipe)
    with RunLock(recipe):
        assert "another process is at work" in one_line(capsys, "rl", recipe_file, "--engine", "verl")


@pytest.mark.usefixtures("verl")
def test_a_whole_run(recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = "sandbox.url=http://127.0.0.1:1", "sandbox.token=s3cret"
    code, out, err = ask(capsys, "rl", recipe_file, *address, "--engine", "verl", "--verl", "x.y=1")
    assert (code, err) == (0, ""), err
    run = run_of(tmp_path)
    recipe = make_recipe(run.config())
    assert (recipe.rl.steps, recipe.sandbox.token) == (2, "")
    overrides = overrides_of(Job("rl", recipe, run.path), ["x.y=1"])
    environment = run.environment()
    assert {key: environment[key] for key in ("job", "engine", "device", "seed", "verl_options")} == {
        "job": "rl", "engine": "verl", "device": "verl, 1 × 8", "seed": 0, "verl_options": overrides
    }  # fmt: skip
    # the data, in the order of the local engine's stream
    rows = pq.read_table(run.path / "verl" / "train.parquet").to_pylist()
    tasks = [task_of({**row, "raw_prompt": row["prompt"]}) for row in rows]
    assert tasks == open_source(recipe).train_tasks(0, 8)
    assert {row["extra_info"]["split"] for row in rows} == {"train"}
    assert [row["extra_info"]["split"] for row in pq.read_table(run.path / "verl" / "val.parquet").to_pylist()] == [
        "eval"
    ]
    # what verl did
    assert [(row["step"], row["acc/mean"]) for row in run.metrics()] == [(1, 0.1), (2, 0.2)]
    assert (run.path / "verl" / "log.txt").read_text() == "token 's3cret' from 0\n"
    # what is kept
    checkpoint = run.checkpoint_path(2)
    assert run.checkpoint_steps() == [2] and run.sound_checkpoint(pytest.fail) == checkpoint
    assert {"config.json", "model.safetensors"} <= set(json.loads((checkpoint / "checksums.json").read_text()))
    assert (checkpoint / "config.json").read_text() == f"{run.path}/verl/global_step_2/actor"
    assert (checkpoint / "chat_template.jinja").read_text() == "template"
    assert run.summary() == {"steps": 2, "checkpoint": str(checkpoint), "engine": "verl"}
    assert "note: verl's loss divides" in out and "✓ RL: " in out
    # a secret is in no file
    found = [path for path in run.path.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]
    assert [path.name for path in found] == ["log.txt"]  # the fake's own word
    assert command_of(Job("rl", recipe, run.path), overrides)[2:4] == [str(run.path), "rl"]


@pytest.mark.usefixtures("verl")
def test_dynamic_sampling_has_more_tasks(recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections = "rl.dynamic_sampling.enabled=true", "rl.eval_every=1", "rl.eval_size=5"
    assert ask(capsys, "rl", recipe_file, *sections, "--engine", "verl", "--quiet")[0] == 0
    state = tmp_path / "runs" / "x" / "verl"
    assert pq.read_metadata(state / "train.parquet").num_rows == 3 * 2 * 4
    assert pq.read_metadata(state / "val.parquet").num_rows == 5


@pytest.mark.usefixtures("verl")
def test_an_interrupted_run_goes_on(
    recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS_AT", str(tmp_path / "fails_at_"))
    (tmp_path / "fails_at_2").touch()
    told = one_line(capsys, "rl", recipe_file, "--engine", "verl", code=1)
    assert told.startswith("verl ended with exit code 1: RuntimeError: out of luck. What it printed is in ")
    assert run_of(tmp_path).summary() == {} and run_of(tmp_path).checkpoint_steps() == []
    (tmp_path / "fails_at_2").unlink()
    # other settings now would be another run
    told = one_line(capsys, "rl", recipe_file, "rl.optim.lr=1e-3", "rl.clip_high=0.3", "--engine", "verl")
    assert told.startswith("run.name = 'x': ") and "other settings (rl.clip_high, rl.optim.lr)" in told
    assert make_recipe(run_of(tmp_path).config()).rl.clip_high == 0.28
    assert ask(capsys, "rl", recipe_file, "--engine", "verl", "--quiet")[0] == 0
    run = run_of(tmp_path)
    assert [row["step"] for row in run.metrics()] == [1, 2]
    assert [line.rpartition(" ")[2] for line in (run.path / "verl" / "log.txt").read_text().splitlines()
            if line.startswith("token")] == ["0", "1"]  # fmt: skip
    assert run.checkpoint_steps() == [2]


@pytest.mark.usefixtures("verl")
def test_a_run_that_is_done_is_not_started_again(
    recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ask(capsys, "rl", recipe_file, "--engine", "verl", "--quiet")[0] == 0
    log = tmp_path / "runs" / "x" / "verl" / "log.txt"
    before = log.read_text(), run_of(tmp_path).summary(), run_of(tmp_path).metrics()
    code, out, _ = ask(capsys, "rl", recipe_file, "--engine", "verl")
    assert code == 0 and f"all 2 steps are done already, in {tmp_path}/runs/x" in out
    assert (log.read_text(), run_of(tmp_path).summary(), run_of(tmp_path).metrics()) == before


@pytest.mark.usefixtures("verl")
def test_a_run_that_never_saved_begins_anew_with_any_settings(
    recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS_AT", str(tmp_path / "fails_at_"))
    (tmp_path / "fails_at_1").touch()
    one_line(capsys, "rl", recipe_file, "--engine", "verl", code=1)
    (tmp_path / "fails_at_1").unlink()
    assert ask(capsys, "rl", recipe_file, "rl.clip_high=0.3", "--engine", "verl", "--quiet")[0] == 0
    assert make_recipe(run_of(tmp_path).config()).rl.clip_high == 0.3


@pytest.mark.usefixtures("verl")
def test_more_steps_are_the_same_run(recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (2, 3):
        assert ask(capsys, "rl", recipe_file, f"rl.steps={steps}", "--engine", "verl", "--quiet")[0] == 0
    run = run_of(tmp_path)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert run.checkpoint_steps() == [2, 3]
    assert make_recipe(run.config()).rl.steps == 3


@pytest.mark.usefixtures("verl")
def test_the_summary_is_of_the_last_step(recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for steps in (2, 3):
        ask(capsys, "rl", recipe_file, f"rl.steps={steps}", "--engine", "verl", "--quiet")
    run = run_of(tmp_path)
    assert (run.summary()["steps"], run.summary()["checkpoint"]) == (3, str(run.checkpoint_path(3)))


@pytest.mark.usefixtures("verl")
def test_a_merger_that_fails_costs_nothing(
    recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGER_FAILS", str(tmp_path / "merger_fails"))
    (tmp_path / "merger_fails").touch()
    told = one_line(capsys, "rl", recipe_file, "--engine", "verl", code=1)
    state = tmp_path / "runs" / "x" / "verl"
    assert told == f"verl's merger failed on {state}/global_step_2/actor: RuntimeError: no shard"
    assert run_of(tmp_path).checkpoint_steps() == []
    assert os.listdir(tmp_path / "runs" / "x" / "checkpoints") == []
    (tmp_path / "merger_fails").unlink()
    assert ask(capsys, "rl", recipe_file, "--engine", "verl", "--quiet")[0] == 0
    assert run_of(tmp_path).checkpoint_steps() == [2]
    assert saved_step(state) == 2


@pytest.mark.usefixtures("verl")
def test_an_evaluation(recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ask(capsys, "eval", recipe_file, "data.test_size=6", "--engine", "verl")
    assert (code, err) == (0, "")
    assert "mean@1" in out and "0.500  (95 % 0.400 to 0.600)" in out
    run = run_of(tmp_path)
    assert run.environment()["job"] == "eval"
    rows = pq.read_table(run.path / "verl" / "val.parquet").to_pylist()
    tasks = [task_of({**row, "raw_prompt": row["prompt"]}) for row in rows]
    assert tasks == open_source(make_recipe(run.config())).eval_tasks("test", 6)
    assert run.metrics() == [] and run.checkpoint_steps() == []
    assert ask(capsys, "eval", recipe_file, "data.test_size=6", "--engine", "verl", "--quiet")[0] == 0  # and again


@pytest.mark.usefixtures("verl")
def test_fine_tuning(recipe_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = ask(capsys, "sft", recipe_file, "--engine", "verl")
    assert (code, err) == (0, ""), err
    run = run_of(tmp_path)
    assert (run.environment()["job"], [row["step"] for row in run.metrics()]) == ("sft", [1, 2])
    assert (run.checkpoint_path(2) / "config.json").read_text() == f"{run.path}/verl/global_step_2"
    assert "✓ SFT: " in out


def test_a_run_that_saved_nothing_is_no_success(tmp_path: Path) -> None:
    recipe = make_recipe({"run": {"out": str(tmp_path), "name": "x"}})
    folder = RunFolder(tmp_path / "x")
    folder.write_config(recipe)
    job = Job("rl", recipe, folder.path)
    job.state.mkdir()
    with pytest.raises(InfraError, match=r"^verl saved no step in .*/x/verl; its output is in .*/x/verl/log\.txt$"):
        export(job, folder, 2)
    assert folder.summary() == {} and recipe_toml(recipe)
    assert os.listdir(folder.path / "checkpoints") == []


def test_a_checkpoint_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    """No merger runs here: there is none."""
    recipe = make_recipe({"run": {"out": str(tmp_path), "name": "x"}})
    folder = RunFolder(tmp_path / "x")
    folder.write_config(recipe)
    job = Job("rl", recipe, folder.path)
    job.state.mkdir()
    (job.state / LATEST).write_text("4")
    folder.checkpoint_path(4).mkdir()
    export(job, folder, 4)
    assert json.loads((folder.path / "summary.json").read_text())["checkpoint"] == str(folder.checkpoint_path(4))

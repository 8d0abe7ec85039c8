"""Supervised fine-tuning on verl, as far as verl is not needed: what a recipe becomes, what is refused, the data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from retool.cluster.option import Job
from retool.cluster.options import overrides_of
from retool.cluster.sft import OF_DATA, begin_epoch_anew, prepare, settled, steps_per_epoch
from retool.config import SHIPPED_RECIPES, load_recipe, make_recipe
from retool.data.conversations import encode
from retool.data.sources import open_source
from retool.errors import ConfigError, DataError
from retool.formats import make_format
from retool.formats.tokenizer import load_tokenizer

NANO = Path(__file__).parents[2] / "src" / "retool" / "nano"


def job_of(folder: Path, *, steps: int = 3, batch_size: int = 8, gpus: int = 2, **sections: Any) -> Job:
    sft = {"steps": steps, "batch_size": batch_size, "max_tokens": 512, **sections.pop("sft", {})}
    cluster = {"gpus_per_node": gpus, **sections.pop("cluster", {})}
    recipe = make_recipe({"sft": sft, "cluster": cluster, **sections})
    return Job("sft", recipe, folder)


def values(job: Job, *extra: str) -> dict[str, str]:
    return dict(override.split("=", 1) for override in overrides_of(job, extra))


def write(job: Job, said: list[str] | None = None) -> int:
    job.state.mkdir(exist_ok=True)
    fmt = make_format(job.recipe.rollout, load_tokenizer(NANO))
    return prepare(job, fmt, (said if said is not None else []).append)()


def test_before_the_data_are_there(tmp_path: Path) -> None:
    found = values(job_of(tmp_path, sft={"save_every": 0, "eval_every": 5}, run={"seed": 4, "keep_checkpoints": 0}))
    assert found["data.train_files"] == f"[{tmp_path}/verl/train.parquet]"
    assert found["data.val_files"] == f"[{tmp_path}/verl/val.parquet]"
    assert found["trainer.default_local_dir"] == f"{tmp_path}/verl"
    assert (found["trainer.total_training_steps"], found["trainer.total_epochs"]) == ("3", "3")
    assert (found["trainer.save_freq"], found["trainer.test_freq"]) == ("-1", "5")  # 0 would be a division by zero
    assert (found["trainer.seed"], found["trainer.max_ckpt_to_keep"]) == ("4", "null")
    assert found["data.custom_cls.path"] == "pkg://retool.cluster.sft_dataset"
    epochs = values(job_of(tmp_path, steps=0, sft={"epochs": 6}, data={"train": "gsm8k"}))
    assert (epochs["trainer.total_training_steps"], epochs["trainer.total_epochs"]) == ("null", "6")


@pytest.mark.parametrize(
    ("micro", "parallel", "expected"), [(16384, 1, 16384), (100, 1, 512), (100, 2, 256), (300, 2, 300)]
)
def test_a_micro_batch_holds_the_longest_conversation(tmp_path: Path, micro: int, parallel: int, expected: int) -> None:
    """verl holds ``max_token_len_per_gpu × sequence parallel`` against a conversation's length."""
    job = job_of(tmp_path, sft={"micro_batch_tokens": micro}, cluster={"sequence_parallel": parallel})
    found = values(job)
    assert int(found["data.max_token_len_per_gpu"]) == expected
    assert expected * parallel >= int(found["data.max_length"])


@pytest.mark.parametrize("name", ["qwen2.5-32b/sft", "qwen2.5-7b/sft"])
def test_the_shipped_recipes(name: str, tmp_path: Path) -> None:
    found = values(Job("sft", load_recipe(SHIPPED_RECIPES / f"{name}.toml", []), tmp_path))
    assert (found["data.train_batch_size"], found["data.max_length"]) == ("32", "16384")


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("run.deterministic = true", {"run": {"deterministic": True}}),
    ("model.random_init", {"model": {"random_init": {"hidden_size": 64}, "tokenizer": "t"}}),
    ('model.dtype = "float32"', {"model": {"dtype": "float32"}}),
    ("model.lora.dropout = 0.1", {"model": {"lora": {"rank": 8, "dropout": 0.1}}}),
    ('sft.optim.name = "muon"', {"sft": {"optim": {"name": "muon"}}}),
    ('sft.optim.schedule = "linear"', {"sft": {"optim": {"schedule": "linear"}}}),
    ("sft.batch_size = 9", {"batch_size": 9}),
    ("sft.batch_size = 8", {"cluster": {"nodes": 3, "gpus_per_node": 8}}),
]


@pytest.mark.parametrize(("says", "sections"), REFUSED)
def test_what_verl_lacks_is_refused_in_one_line(says: str, sections: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"with --engine verl: .*, or use --engine local$") as error:
        overrides_of(job_of(tmp_path, **sections))
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)


def test_what_a_field_sets_is_not_set_twice(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    with pytest.raises(ConfigError, match=r"give sft.batch_size=… instead"):
        overrides_of(job, ["data.train_batch_size=4"])
    assert values(job, "data.num_workers=2")["data.num_workers"] == "2"


# --- the data ---------------------------------------------------------------------------------------------------------


def test_the_file_holds_our_ids_and_mask(tmp_path: Path) -> None:
    job, said = job_of(tmp_path), list[str]()
    assert write(job, said) == 3
    assert said == []
    learnt, held_out = open_source(job.recipe).conversations(24)
    fmt = make_format(job.recipe.rollout, load_tokenizer(NANO))
    for name, conversations in (("train", learnt), ("val", held_out)):
        rows = {row["id"]: row for row in pq.read_table(job.state / f"{name}.parquet").to_pylist()}
        encoded, _ = encode(conversations, fmt, 512)
        assert len(rows) == len(encoded)
        for one in encoded:
            row = rows[one.conversation.id]
            assert (row["ids"], row["mask"]) == (one.ids_T, one.mask_T)
            assert (json.loads(row["messages"]), row["tools"]) == (one.conversation.messages, one.conversation.tools)
            assert row["mask"][0] == 0  # verl's shifted mask would give it to the sequence before


def test_the_seed_orders_the_file(tmp_path: Path) -> None:
    """verl's own shuffle has one seed for all runs."""
    orders = []
    for seed in (0, 0, 1):
        write(job_of(tmp_path, run={"seed": seed}))
        orders.append([row["ids"] for row in pq.read_table(tmp_path / "verl" / "train.parquet").to_pylist()])
    assert orders[0] == orders[1] != orders[2]


def test_with_the_data_the_steps_are_known(tmp_path: Path, gsm8k: str) -> None:
    """Of 36 conversations with batches of 8 an epoch has 4 steps; the rest waits for another epoch's order."""
    sections = {"data": {"train": gsm8k}, "sft": {"epochs": 3, "eval_every": 2}}
    job = job_of(tmp_path, steps=0, **sections)
    assert write(job) == 12
    found = values(job)
    assert (found["trainer.total_training_steps"], found["trainer.total_epochs"]) == ("12", "3")
    more = job_of(tmp_path, steps=13, **sections)
    assert write(more) == 13
    assert values(more)["trainer.total_epochs"] == "4"


def test_held_out_conversations_that_fill_no_batch(tmp_path: Path, gsm8k: str) -> None:
    """verl's loader would give none of them, and the mean of no loss."""
    job, said = job_of(tmp_path, steps=0, data={"train": gsm8k}, sft={"eval_every": 2}), list[str]()
    job.state.mkdir()
    (job.state / "val.parquet").touch()
    write(job, said)
    assert said == ["4 held-out conversations do not fill a batch of 8: no val/loss"]
    assert not (job.state / "val.parquet").exists()
    found = values(job)
    assert (found["data.val_files"], found["trainer.test_freq"]) == ("null", "-1")


def test_too_few_or_too_long(tmp_path: Path, gsm8k: str) -> None:
    with pytest.raises(DataError, match=r"sft.batch_size = 64: there are only 36 conversations"):
        write(job_of(tmp_path, steps=0, batch_size=64, data={"train": gsm8k}))
    with pytest.raises(DataError, match=r"sft.max_tokens = 8: all 24 conversations are longer"):
        write(job_of(tmp_path, sft={"max_tokens": 8}))


@pytest.fixture
def gsm8k(tmp_path: Path) -> str:
    """A file of 40 conversations, of which 4 are held out."""
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": r"\boxed{4}"}]
    path = tmp_path / "conversations.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "messages": turns}) + "\n" for i in range(40)))
    return str(path)


# --- what the child settles -------------------------------------------------------------------------------------------


def test_the_child_settles_what_the_launcher_could_not_know(tmp_path: Path, gsm8k: str) -> None:
    job = job_of(tmp_path, steps=0, data={"train": gsm8k}, sft={"epochs": 3, "eval_every": 2})
    before = overrides_of(job, ["data.pad_mode=right"])
    write(job)
    after = settled(job, before)
    assert dict(line.split("=", 1) for line in after) == values(job, "data.pad_mode=right")
    assert {line for line in after if line not in before} == {
        "data.val_files=null", "trainer.total_training_steps=12", "trainer.test_freq=-1"
    }  # fmt: skip
    assert sum(line.partition("=")[0] in OF_DATA for line in after) == len(OF_DATA)


@pytest.mark.parametrize(("step", "forgotten"), [(4, True), (6, False), (8, True)])
def test_at_an_epochs_end_the_loader_is_forgotten(step: int, forgotten: bool, tmp_path: Path, gsm8k: str) -> None:
    job = job_of(tmp_path, steps=0, data={"train": gsm8k})
    write(job)
    begin_epoch_anew(job)  # nothing is saved yet
    saved = job.state / f"global_step_{step}"
    saved.mkdir()
    for name in ("data_0.pt", "data_1.pt", "model_world_size_2_rank_0.pt"):
        (saved / name).touch()
    (job.state / "latest_checkpointed_iteration.txt").write_text(str(step))
    begin_epoch_anew(job)
    assert (saved / "model_world_size_2_rank_0.pt").exists()
    assert [(saved / f"data_{rank}.pt").exists() for rank in (0, 1)] == [not forgotten] * 2


def test_whole_batches_only() -> None:
    assert [steps_per_epoch(n, 8) for n in (7, 8, 15, 16)] == [0, 1, 1, 2]


def test_the_options_need_no_torch() -> None:
    code = "import sys, retool.cluster.sft; sys.exit(sorted({'torch', 'verl', 'ray'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

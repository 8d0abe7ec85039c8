"""Supervised fine-tuning against verl itself: its configuration, its loaders, its loss, and a run on two gloo ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from fakes import tiny_tokenizer

# "verl" alone would find this very folder, as a namespace package, where verl is not installed.
pytest.importorskip("verl.trainer", reason="needs the cluster environment (constraints of verl)")

import cpu
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import AutoModelForCausalLM
from verl.utils import tensordict_utils as tu
from verl.utils.dataset.dataset_utils import SFTTensorCollator
from verl.utils.import_utils import load_extern_object
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.losses import sft_loss

from retool.algo.batch import Sample
from retool.cluster.main import compose
from retool.cluster.option import CONFIGS, Job
from retool.cluster.options import overrides_of
from retool.cluster.sft import prepare, steps_per_epoch, train_sft
from retool.cluster.sft_dataset import ConversationDataset
from retool.config import OptimConfig, make_recipe, recipe_toml
from retool.data.conversations import encode
from retool.data.retool_sft import extract_question
from retool.data.sources import open_source
from retool.engine.learner import Learner, supervised
from retool.engine.model import load_model
from retool.errors import ConfigError
from retool.formats import make_format
from retool.formats.tokenizer import load_tokenizer

NANO = Path(__file__).parents[2] / "src" / "retool" / "nano"
PACKED = {"pad_mode": "no_padding"}


def job_of(folder: Path, **sections: Any) -> Job:
    sft = {"steps": 2, "batch_size": 16, "max_tokens": 512, "micro_batch_tokens": 2048, **sections.pop("sft", {})}
    tree = {"sft": sft, "model": {"device": "cpu"}, "cluster": {"gpus_per_node": 2}, **sections}
    return Job("sft", make_recipe(tree), folder)


def write(job: Job, tokenizer: Any = None) -> int:
    job.state.mkdir(exist_ok=True)
    fmt = make_format(job.recipe.rollout, tokenizer or load_tokenizer(NANO))
    return prepare(job, fmt, lambda line: None)()


def data_of(job: Job, name: str = "train", **config: Any) -> ConversationDataset:
    """As verl finds it by the job's options."""
    options = dict(override.split("=", 1) for override in overrides_of(job))
    found = load_extern_object(options["data.custom_cls.path"], options["data.custom_cls.name"])
    files = [str(job.state / f"{name}.parquet")]
    made: ConversationDataset = found(parquet_files=files, tokenizer=None, config=PACKED | config, processor=None)
    return made


# --- options ----------------------------------------------------------------------------------------------------------


def test_verl_has_every_option(tmp_path: Path) -> None:
    config = compose(overrides_of(job_of(tmp_path)), CONFIGS["sft"])
    assert config.data.train_batch_size == 16
    assert config.engine.strategy == "fsdp2"
    assert config.optim.lr_warmup_steps == 0


def test_an_unknown_option_is_one_line_and_starts_nothing(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    write(job)
    with pytest.raises(ConfigError, match=r"verl's options: Could not override 'data.batch'") as error:
        train_sft(job.recipe, tmp_path, overrides_of(job, ["data.batch=3"]))
    assert "\n" not in str(error.value)


def test_padding_is_refused_in_one_line(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    write(job)
    with pytest.raises(ConfigError, match=r"data.pad_mode=right: conversations are packed; leave it"):
        train_sft(job.recipe, tmp_path, overrides_of(job, ["data.pad_mode=right"]))
    with pytest.raises(ConfigError, match=r"data.pad_mode=right: conversations are packed; leave it"):
        data_of(job, pad_mode="right")


# --- the data set -----------------------------------------------------------------------------------------------------


def check(job: Job, tokenizer: Any) -> int:
    """The data set holds exactly the ids and the mask of the conversations; how many tokens are learnt."""
    write(job, tokenizer)
    fmt = make_format(job.recipe.rollout, tokenizer)
    expected = {}
    for conversation in open_source(job.recipe).conversations(job.recipe.sft.steps * job.recipe.sft.batch_size)[0]:
        expected[conversation.id] = fmt.conversation_ids(conversation.messages, tools=conversation.tools)
    data = data_of(job)
    names = pq.read_table(job.state / "train.parquet")["id"].to_pylist()
    assert len(data) == len(names) == len(expected)
    for name, item in zip(names, (data[i] for i in range(len(data))), strict=True):
        assert (item["input_ids"].tolist(), item["loss_mask"].tolist()) == tuple(map(list, expected[name]))
        assert item["position_ids"].tolist() == list(range(len(item["input_ids"])))
        assert {value.dtype for value in item.values()} == {torch.int64}
    return sum(int(data[i]["loss_mask"].sum()) for i in range(len(data)))


@pytest.mark.parametrize("form", ["hermes", "code_tags"])
def test_the_worlds_conversations(form: str, tmp_path: Path) -> None:
    job = job_of(tmp_path, rollout={"format": form}, data={"sft_tool_share": 1.0}, sft={"max_tokens": 4096})
    assert check(job, tiny_tokenizer() if form == "code_tags" else load_tokenizer(NANO)) > 0


@pytest.mark.parametrize("form", ["hermes", "code_tags"])
def test_rows_of_retool_sft(form: str, tmp_path: Path, shared_data: Path) -> None:
    """The one published trajectory that is here, as rows of a file, in Qwen's own tokens."""
    folder = shared_data / "retool_sft"
    prompt = json.loads((folder / "prompt_template.json").read_text())["retool"]
    messages = json.loads((folder / "converted_sample_rewrapped.json").read_text())["messages"]
    question = extract_question(messages[0]["content"])
    turns = [{**message, "content": message["content"].strip()} for message in messages[1:]]
    asked = [{"role": "user", "content": prompt.format(query=question)}]
    rows = [{"id": str(i), "messages": [*asked, *turns]} for i in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft = {"steps": 0, "batch_size": 2, "max_tokens": 8192}
    job = job_of(tmp_path, rollout={"format": form}, data={"train": str(path)}, sft=sft)
    assert check(job, load_tokenizer(shared_data / "tokenizer" / "qwen2.5")) > 11 * 200


# --- the loss ---------------------------------------------------------------------------------------------------------


def verl_loss(model: Any, items: Sequence[dict[str, torch.Tensor]], *, parts: int = 1) -> float:
    """verl's loss of a batch: what its engine makes of the data set's items, cut into ``parts``, up to its gradient."""
    batch = tu.get_tensordict(
        SFTTensorCollator("no_padding")(list(items)),
        {"use_remove_padding": False, "pad_mode": "no_padding", "temperature": 1.0, "use_fused_kernels": False},
    )
    tu.assign_non_tensor(batch, batch_num_tokens=batch["loss_mask"].values().sum().item(), dp_size=1)
    engine = SimpleNamespace(
        pad_to_length=False, use_ulysses_sp=False, engine_config=SimpleNamespace(entropy_checkpointing=False)
    )
    total = 0.0
    for part in tu.chunk_tensordict(batch, parts):
        inputs, arguments = FSDPEngineWithLMHead.prepare_model_inputs(engine, part)
        output = model(**inputs, use_cache=False)
        outputs = FSDPEngineWithLMHead.prepare_model_outputs(engine, output, arguments, part, None)
        loss, _ = sft_loss(None, outputs, part)
        loss.backward()
        total += loss.item()
    return total


@pytest.mark.parametrize("parts", [1, 4])
def test_verls_loss_is_ours(parts: int, tmp_path: Path) -> None:
    """Value and gradient over the nano model: exactly the tokens of our mask are learnt, each with the same weight."""
    job = job_of(tmp_path)
    write(job)
    data = data_of(job)
    items = [data[i] for i in range(8)]
    theirs = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32, attn_implementation="sdpa")
    found = verl_loss(theirs, items, parts=parts)

    total, tokens = 0.0, 0
    with torch.no_grad():
        for item in items:
            logprobs = theirs(input_ids=item["input_ids"][None]).logits[0].log_softmax(-1)
            for place in item["loss_mask"].nonzero()[:, 0].tolist():
                total -= float(logprobs[place - 1, item["input_ids"][place]])
                tokens += 1
    assert found == pytest.approx(total / tokens, abs=1e-5)

    ours, _ = load_model(make_recipe({"model": {"device": "cpu"}}).model)
    learner = Learner(ours, OptimConfig(grad_clip=1e9), total_steps=1, micro_batch_tokens=512)
    samples = [Sample(item["input_ids"].tolist(), item["loss_mask"].tolist()) for item in items]
    metrics = learner.update(samples, supervised)
    assert found == pytest.approx(metrics["loss"], abs=1e-5)
    squares = sum(float(p.grad.square().sum()) for p in theirs.parameters() if p.grad is not None)
    assert squares**0.5 == pytest.approx(metrics["grad_norm"], rel=1e-4)


# --- the loaders ------------------------------------------------------------------------------------------------------


def loader_of(data: ConversationDataset, rank: int, ranks: int, batch: int) -> tuple[Any, Any]:
    """As ``verl.trainer.sft_trainer`` makes them."""
    sampler: Any = DistributedSampler(data, shuffle=True, num_replicas=ranks, rank=rank, drop_last=True)
    loader: Any = StatefulDataLoader(
        data, batch_size=batch // ranks, sampler=sampler, collate_fn=SFTTensorCollator("no_padding"), drop_last=True
    )
    return sampler, loader


@pytest.mark.parametrize("count", [8, 23, 24, 31])
@pytest.mark.parametrize(("ranks", "batch"), [(1, 8), (2, 8), (4, 8), (8, 8), (3, 6)])
def test_an_epoch_has_as_many_steps_as_we_say(count: int, ranks: int, batch: int, tmp_path: Path) -> None:
    job = job_of(tmp_path, sft={"steps": count, "batch_size": 1}, cluster={"gpus_per_node": 1})
    write(job)
    data = data_of(job)
    assert len(data) == count
    for rank in range(ranks):
        _, loader = loader_of(data, rank, ranks, batch)
        assert len(loader) == len(list(loader)) == steps_per_epoch(count, batch)


def test_a_loader_saved_at_its_end_gives_an_empty_epoch(tmp_path: Path) -> None:
    """Why ``begin_epoch_anew`` exists: once this fails, verl's trainer needs it no more."""
    job = job_of(tmp_path, sft={"steps": 4, "batch_size": 4}, cluster={"gpus_per_node": 1})
    write(job)
    data, kept = data_of(job), []
    for step, _ in enumerate(loader := loader_of(data, 0, 1, 4)[1]):
        if step in (1, 3):
            kept.append(loader.state_dict())
    assert len(kept) == 2
    for state, left in zip(kept, (2, 0), strict=True):
        _, resumed = loader_of(data, 0, 1, 4)
        resumed.load_state_dict(state)
        assert len(list(resumed)) == left


# --- a run ------------------------------------------------------------------------------------------------------------


def run(job: Job, extra: Sequence[str] = ()) -> list[tuple[int, dict[str, float]]]:
    """What the launcher starts, and what verl logged."""
    (job.folder / "config.toml").write_text(recipe_toml(job.recipe))
    metrics = job.state / "metrics.jsonl"
    options = overrides_of(
        job, [o for o in cpu.SFT_OPTIONS if o.split("=")[0].startswith(("+", "model", "engine.use"))]
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "retool.cluster.main", str(job.folder), "sft", *options, *extra],
        env=cpu.environment({"VERL_FILE_LOGGER_PATH": str(metrics)}),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=job.folder,
    )  # fmt: skip
    with process:
        try:
            # not communicate(), which would close the standard input: the child ends with it
            assert process.stdout is not None
            output = process.stdout.read()
            assert process.wait(240) == 0, output[-4000:]
        finally:
            process.kill()
    return [(row["step"], row["data"]) for row in map(json.loads, metrics.read_text().splitlines())]


def test_two_ranks_learn_as_the_local_engine_does_and_go_on_where_they_were(tmp_path: Path) -> None:
    """The same batches through our learner give the same losses; a run resumed at an epoch's end goes on with the next
    epoch; nothing is written to the folder where the command was typed."""
    learning = {"save_every": 0, "optim": {"lr": 1e-3}}
    job = job_of(tmp_path, sft=learning)
    assert write(job) == 2
    logged = run(job)
    more = Job(
        "sft", make_recipe({**job.recipe.model_dump(), "sft": {**job.recipe.sft.model_dump(), "steps": 3}}), tmp_path
    )
    logged += run(more)
    losses = [data["train/loss"] for _, data in logged if "train/loss" in data]
    norms = [data["train/grad_norm"] for _, data in logged if "train/grad_norm" in data]
    assert [step for step, data in logged if "train/loss" in data] == [1, 2, 3]
    assert all(data["val/loss"] > 0 for step, data in logged if "val/loss" in data)
    assert (job.state / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert (job.state / "global_step_3" / "huggingface" / "chat_template.jinja").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.toml", "verl"]

    rows = pq.read_table(job.state / "train.parquet").to_pylist()
    optim = job.recipe.sft.optim
    model, _ = load_model(job.recipe.model)
    learner = Learner(model, optim, total_steps=3, micro_batch_tokens=2048)
    for step in range(3):
        epoch, place = divmod(step, 2)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch)).tolist()
        chosen = [rows[i] for i in order[place * 16 : (place + 1) * 16]]
        metrics = learner.update([Sample(row["ids"], row["mask"]) for row in chosen], supervised)
        assert losses[step] == pytest.approx(metrics["loss"], abs=1e-4)
        assert norms[step] == pytest.approx(metrics["grad_norm"], rel=1e-3)


def test_encode_is_what_the_local_engine_learns() -> None:
    fmt = make_format(make_recipe({}).rollout, load_tokenizer(NANO))
    conversations = open_source(make_recipe({})).conversations(8)[0]
    whole, _ = encode(conversations, fmt, 10_000)
    longest = max(len(one.ids_T) for one in whole)
    found, too_long = encode(conversations, fmt, longest - 1)
    assert (len(found) + too_long, too_long > 0) == (len(whole), True)

"""Supervised fine-tuning on verl: its options, the data that its trainer reads, and what runs it.

verl learns from whole batches only: of an epoch, what does not fill the last batch is left for another epoch's order.
Nothing here imports verl before ``train_sft`` is called.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from retool.cluster.option import CONFIGS, Job, Option, chosen, hydra_value, lora, model, optimiser, room_for, same
from retool.cluster.refusals import REFUSED_EVAL, Refusal, optimiser_refusals
from retool.cluster.state import saved_step
from retool.config import Recipe
from retool.data.conversations import Encoded, encode
from retool.data.sources import open_source
from retool.errors import ConfigError, DataError
from retool.formats.chat import ChatFormat
from retool.store import write_rows

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("messages", pa.string()),
        ("tools", pa.bool_()),
        ("ids", pa.list_(pa.int32())),
        ("mask", pa.list_(pa.int8())),
    ]
)
"""One row a conversation, in the order of the run's seed. ``messages`` is JSON, for people; verl learns ``ids`` where
``mask`` is 1."""


# --- what the fields mean to verl -------------------------------------------------------------------------------------


def _train_file(job: Job) -> Path:
    return job.state / "train.parquet"


def _val_file(job: Job) -> Path:
    return job.state / "val.parquet"


def _tests(job: Job) -> bool:
    """Whether there are held-out conversations enough for a batch; true as long as nobody knows."""
    return _val_file(job).exists() or not _train_file(job).exists()


def _ranks(job: Job) -> int:
    """Groups of GPUs that learn from different conversations."""
    cluster = job.recipe.cluster
    return cluster.nodes * cluster.gpus_per_node // cluster.sequence_parallel


def _tokens(job: Job) -> int:
    """Of a GPU's micro-batch. verl takes no conversation that is longer than its GPUs hold together, where the local
    engine gives it a micro-batch of its own: so there is always room for the longest."""
    sft = job.recipe.sft
    return room_for(sft.micro_batch_tokens, sft.max_tokens, job.recipe.cluster.sequence_parallel)


def steps_per_epoch(conversations: int, batch_size: int) -> int:
    """Of verl's loaders, which drop what does not fill a batch. Each of the ranks has ``conversations // ranks`` of
    them, and takes ``batch_size // ranks`` a step; ``ranks`` divides the batch (see ``REFUSED_SFT``)."""
    return conversations // batch_size


def _epoch(job: Job) -> int:
    """Steps of an epoch; 0 as long as the data are not there."""
    file = _train_file(job)
    return steps_per_epoch(pq.read_metadata(file).num_rows, job.recipe.sft.batch_size) if file.exists() else 0


def _steps(job: Job) -> int | None:
    sft = job.recipe.sft
    return sft.steps or sft.epochs * _epoch(job) or None


def _epochs(job: Job) -> int:
    """As many as the steps need: verl ends with whichever comes first. Until the data are there, an epoch is taken to
    have one step."""
    return -(-job.recipe.sft.steps // (_epoch(job) or 1)) or job.recipe.sft.epochs


SFT: tuple[Option, ...] = (
    # data
    Option("data.train_files", "data.train", lambda job: [str(_train_file(job))]),
    Option("data.val_files", "data.train", lambda job: [str(_val_file(job))] if _tests(job) else None),
    Option("data.custom_cls.path", "rollout.format", lambda job: "pkg://retool.cluster.sft_dataset"),
    Option("data.custom_cls.name", "rollout.format", lambda job: "ConversationDataset"),
    same("data.train_batch_size", "sft.batch_size"),
    same("data.max_length", "sft.max_tokens"),
    chosen("data.use_dynamic_bsz", True),
    Option("data.max_token_len_per_gpu", "sft.micro_batch_tokens", _tokens),
    chosen("data.num_workers", 0),  # the tokens are in the memory already
    # the model
    *model("model"),
    *lora("model"),
    chosen("engine.strategy", "fsdp2"),
    same("engine.ulysses_sequence_parallel_size", "cluster.sequence_parallel"),
    same("engine.param_offload", "cluster.offload"),
    same("engine.optimizer_offload", "cluster.offload"),
    *optimiser("optim", "sft.optim"),
    # the run
    same("trainer.nnodes", "cluster.nodes"),
    same("trainer.n_gpus_per_node", "cluster.gpus_per_node"),
    Option("trainer.device", "model.device", lambda job: "cpu" if job.recipe.model.device == "cpu" else "cuda"),
    same("trainer.seed", "run.seed"),
    Option("trainer.total_training_steps", "sft.steps", _steps),
    Option("trainer.total_epochs", "sft.epochs", _epochs),
    Option("trainer.save_freq", "sft.save_every", lambda job: job.recipe.sft.save_every or -1),
    Option("trainer.test_freq", "sft.eval_every", lambda job: (_tests(job) and job.recipe.sft.eval_every) or -1),
    Option("trainer.default_local_dir", "run.name", lambda job: str(job.state)),
    Option("trainer.max_ckpt_to_keep", "run.keep_checkpoints", lambda job: job.recipe.run.keep_checkpoints or None),
    Option("trainer.resume_mode", "run.resume", lambda job: "auto"),
    Option("trainer.logger", "run.trackers", lambda job: ["console", "file"]),
    same("trainer.project_name", "run.project"),
    same("trainer.experiment_name", "run.name"),
)
"""``verl.trainer.sft_trainer`` and ``sft_trainer_ray`` (``sft_trainer_engine.yaml``)."""
OF_DATA = ("data.val_files", "trainer.total_training_steps", "trainer.total_epochs", "trainer.test_freq")
"""Those whose value is known only when the data are there."""

REFUSED_SFT: tuple[Refusal, ...] = (
    *REFUSED_EVAL,
    (
        "model.lora.dropout",
        lambda job: job.recipe.model.lora.dropout > 0,
        "verl has none such; set it to 0",
    ),
    *optimiser_refusals("sft.optim"),
    (
        "sft.batch_size",
        lambda job: job.recipe.sft.batch_size % _ranks(job) > 0,
        "every group of GPUs takes an equal share; give a multiple of cluster.nodes × cluster.gpus_per_node / "
        "cluster.sequence_parallel",
    ),
)
"""See ``options.REFUSED``."""


# --- data -------------------------------------------------------------------------------------------------------------


def prepare(job: Job, fmt: ChatFormat, complain: Callable[[str], None]) -> Callable[[], int]:
    """Read the conversations and make them tokens. What is returned writes them to ``job.state`` and says how many
    steps the run has.

    Raises:
        DataError: a conversation cannot be written in the format, or there are too few for a batch.
    """
    config, seed = job.recipe.sft, job.recipe.run.seed
    conversations, held_out = open_source(job.recipe).conversations(config.steps * config.batch_size)
    learnt, too_long = encode(conversations, fmt, config.max_tokens)
    tested, _ = encode(held_out, fmt, config.max_tokens)
    if not learnt:
        raise DataError(f"sft.max_tokens = {config.max_tokens}: all {too_long} conversations are longer; raise it")
    if too_long:
        complain(f"{too_long} of {len(conversations)} conversations have over {config.max_tokens} tokens: left out")
    if not steps_per_epoch(len(learnt), config.batch_size):
        raise DataError(
            f"sft.batch_size = {config.batch_size}: there are only {len(learnt)} conversations, and verl learns from "
            "whole batches; make it smaller"
        )
    if not steps_per_epoch(len(tested), config.batch_size):
        complain(f"{len(tested)} held-out conversations do not fill a batch of {config.batch_size}: no val/loss")
        tested = []
    # verl's own order has a fixed seed
    random.Random(f"sft/{seed}/0").shuffle(learnt)

    def write() -> int:
        _val_file(job).unlink(missing_ok=True)
        if tested:
            write_encoded(_val_file(job), tested)
        write_encoded(_train_file(job), learnt)
        return _steps(job) or 0

    return write


def write_encoded(path: Path, found: Sequence[Encoded]) -> None:
    """Conversations as the file ``path`` (``SCHEMA``)."""
    rows = [
        {
            "id": one.conversation.id,
            "messages": json.dumps(one.conversation.messages, ensure_ascii=False),
            "tools": one.conversation.tools,
            "ids": one.ids_T,
            "mask": one.mask_T,
        }
        for one in found
    ]
    write_rows(path, rows, SCHEMA)


# --- running it -------------------------------------------------------------------------------------------------------


def train_sft(recipe: Recipe, folder: Path, overrides: Sequence[str]) -> None:
    """Run verl's trainer until it is done: on one node with torchrun, else on the Ray cluster. A signal that ends this
    process ends the workers.

    Raises:
        ConfigError: verl refuses an option; nothing has been started.
        SystemExit: the trainer failed, or was ended; its output says why.
    """
    from retool.cluster.main import compose

    job = Job("sft", recipe, folder.resolve())
    overrides = settled(job, overrides)
    config = compose(overrides, CONFIGS["sft"])
    if config.data.pad_mode != "no_padding":
        raise ConfigError(f"--verl data.pad_mode={config.data.pad_mode}: conversations are packed; leave it out")
    begin_epoch_anew(job)
    if recipe.cluster.nodes == 1:
        _torchrun(job, overrides)
    else:
        _on_ray(recipe, config)


def settled(job: Job, overrides: Sequence[str]) -> list[str]:
    """The overrides with what is known now that the data are there."""
    known = {option.key: f"{option.key}={hydra_value(option.get(job))}" for option in SFT if option.key in OF_DATA}
    kept = [override for override in overrides if override.partition("=")[0] not in OF_DATA]
    return [*kept, *(known[key] for key in OF_DATA)]


def begin_epoch_anew(job: Job) -> None:
    """Where the last checkpoint stands at an epoch's end, forget how far its loader was.

    That loader counts as being in the epoch that it has gone through, while the trainer goes on with the next one: it
    would get no batch of it, and the run would end an epoch short of its steps, without its last checkpoint.
    """
    step, epoch = saved_step(job.state), _epoch(job)
    if step and epoch and step % epoch == 0:
        for file in (job.state / f"global_step_{step}").glob("data_*.pt"):
            file.unlink()


def _torchrun(job: Job, overrides: Sequence[str]) -> None:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    # Hydra would write its own files to where the command was typed
    hydra = [f"hydra.run.dir={hydra_value(str(job.state / 'hydra'))}", "hydra.output_subdir=null"]
    where = ["--standalone", "--nnodes=1", f"--nproc_per_node={job.recipe.cluster.gpus_per_node}"]
    try:
        main([*where, "-m", "verl.trainer.sft_trainer", *overrides, *hydra])
    except ChildFailedError:  # the worker's own traceback stands above
        raise SystemExit(1) from None
    except SignalException as ended:
        raise SystemExit(128 + ended.sigval) from None


def _on_ray(recipe: Recipe, config: Any) -> None:
    if recipe.cluster.address:
        os.environ["RAY_ADDRESS"] = recipe.cluster.address  # verl starts Ray without saying where
    from verl.trainer.sft_trainer_ray import run_sft
    from verl.utils.device import auto_set_device

    auto_set_device(config)
    run_sft(config)

"""What every job needs, put together from a recipe: model, tokenizer, format, policy, sandbox."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retool.config import Recipe
from retool.engine.checkpoint import ADAPTER
from retool.engine.lora import add_lora, load_adapter
from retool.engine.model import load_model, prepare_torch
from retool.engine.policy import LocalPolicy
from retool.formats import make_format
from retool.formats.chat import ChatFormat
from retool.protocols import Sandbox
from retool.rollout import Rollout, make_rollout
from retool.sandbox import choose


@dataclass
class Runtime:
    """One model and what speaks for it."""

    recipe: Recipe
    model: Any
    tokenizer: Any
    fmt: ChatFormat

    def policy(self) -> LocalPolicy:
        recipe = self.recipe
        return LocalPolicy(
            self.model,
            decode=self.fmt.decode,
            kv_budget_mb=recipe.engine.kv_budget_mb,
            max_live=recipe.engine.max_live,
            max_context=recipe.rollout.max_context,
            prefill_chunk=recipe.engine.prefill_chunk,
            deterministic=recipe.run.deterministic,
        )

    def rollout(self, policy: LocalPolicy, sandbox: Sandbox) -> Rollout:
        return make_rollout(self.recipe, policy, self.fmt, sandbox)


def load_runtime(recipe: Recipe, checkpoint: Path | None = None) -> Runtime:
    """Load the recipe's model, or go on from ``checkpoint``: a whole model, or the adapter that is trained on it.

    Raises:
        ConfigError: see ``load_model`` and ``add_lora``.
    """
    prepare_torch(recipe.run)
    config, adapted = recipe.model, recipe.model.lora.rank > 0
    if checkpoint is not None and not adapted:
        config = config.model_copy(update={"path": str(checkpoint), "tokenizer": "", "random_init": {}})
    model, tokenizer = load_model(config)
    if adapted:
        add_lora(model, config.lora, recipe.run.seed)
        if checkpoint is not None:
            load_adapter(model, checkpoint / ADAPTER)
    if recipe.engine.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return Runtime(recipe, model, tokenizer, make_format(recipe.rollout, tokenizer))


@asynccontextmanager
async def open_sandbox(recipe: Recipe) -> AsyncIterator[Sandbox]:
    """The sandbox, closed with everything in it however the job ends."""
    sandbox = await choose.open_sandbox(recipe.sandbox)
    try:
        yield sandbox
    finally:
        await sandbox.close()

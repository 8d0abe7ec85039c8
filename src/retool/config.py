"""Recipes: TOML files, ``section.key=value`` overrides, and every check of a user's input.

Nothing here imports torch. A mistake ends in one line (``ConfigError``) that names the field, the value and the mend.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from retool.errors import ConfigError

Beta = Annotated[float, Field(ge=0, lt=1)]

SHIPPED_RECIPES = Path(__file__).parent / "recipes"
"""The recipes inside the package, known by their names."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes ``true`` for 1, which would make ``rl.steps=true`` a run of one step."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise PydanticCustomError("number_type", "input should be a number")
        return value


class RunConfig(Section):
    name: str = Field(default="run", min_length=1)
    out: str = Field(default="runs", min_length=1)
    """The run folder is ``out/name``."""
    seed: int = 0
    deterministic: bool = False
    """A resumed or repeated run is equal bit by bit on the CPU; the rollout waits for all code before it goes on."""
    resume: Literal["auto", "never"] = "auto"
    """auto: the same command typed again goes on from the last checkpoint. never: a run folder that is there is an
    error."""
    threads: int = Field(default=0, ge=0)
    """torch's CPU threads; 0: all cores while it learns, all less one while code runs beside it (at least one)."""


class ModelConfig(Section):
    path: str = "nano"
    """``nano`` (the base model inside this package), a folder in Hugging Face layout, or a hub name; with
    ``random_init`` only its architecture is used."""
    tokenizer: str = ""
    """A folder or hub name; empty: beside the model."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: float32 on the CPU, bfloat16 on CUDA."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    random_init: dict[str, int] = Field(default_factory=dict)
    """Not empty: a Qwen2 of these sizes with random weights, e.g. ``{hidden_size = 64, num_hidden_layers = 2}``."""


class DataConfig(Section):
    train: str = Field(default="world", min_length=1)
    """What is learnt from: ``world`` (the built-in task families of the quickstart), a data set's name (``retool data
    list``), a Parquet or JSON Lines file, or a hub name. ``sft`` needs conversations, or solutions that become some;
    ``rl`` needs problems with answers."""
    train_file: str = ""
    """A local copy of what ``train`` names; empty: from the hub."""
    test: str = ""
    """What evaluations read, named as ``train`` is; empty: the test split of ``train``."""
    test_file: str = ""
    """A local copy of what ``test`` names, or of the test split of ``train``."""
    columns: dict[str, str] = Field(default_factory=dict)
    """For files of one's own: which column holds ``question``, ``answer``, ``solution``, ``id``."""
    against: list[str] = Field(default_factory=list)
    """Sets (``aime-2025``, or ``aime-2025=FILE``) whose problems must not be learnt: training problems that overlap
    with them are left out. How overlap is found is in docs/data.md."""
    chinese: bool = True
    """False: training problems that hold Chinese are left out."""
    train_size: int = Field(default=0, ge=0)
    """Rows of the training set that are used; 0: all of them. The world draws as many as the job needs."""
    test_size: int = Field(default=480, ge=1)
    test_split: Literal["test", "dev"] = "test"
    """Which split evaluations read. Choose settings on dev, the last tenth of the training set; report on test."""
    sft_tool_share: float = Field(default=0.3, ge=0, le=1)
    """world: share of the demonstrations that run code, among those of hard problems whose prompt shows the tool."""


class SandboxConfig(Section):
    tier: Literal["full", "userns", "restricted"] = "restricted"
    """The least isolation to accept; below it the sandbox refuses to start. What each tier holds is in
    docs/sandbox.md."""
    workers: int = Field(default=0, ge=0)
    """Programs that run at a time; 0: 2 × cores + 8."""
    timeout_s: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Wall-clock seconds of one run."""
    cpu_s: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """CPU seconds of each of a run's processes; 0: what all cores can give within its wall-clock time."""
    memory_mb: int = Field(default=1024, ge=32)
    """Memory of one run, and the most that a request may ask for. As address space it is every process's limit; in
    tier ``full`` it is also the limit of all of a run's processes together, with its files."""
    output_kb: int = Field(default=64, ge=1)
    """KiB of stdout, and again of stderr; a run that writes more is ended."""
    file_mb: int = Field(default=64, ge=1)
    """Each run's private disk, in memory (tiers ``full`` and ``userns``); the largest file in each tier."""
    max_files: int = Field(default=1024, ge=16)
    """Files and folders on that disk."""
    processes: int = Field(default=64, ge=1)
    """Processes and threads of one run; tier ``restricted`` allows threads only."""
    stateful: bool = False
    """One interpreter for all the calls of a trajectory, instead of a fresh one for each, as in the paper."""
    session_idle_s: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    """A stateful interpreter that gets no code for so long is ended."""
    preload: list[str] = Field(
        default_factory=lambda: ["math", "random", "itertools", "fractions", "decimal", "numpy", "scipy", "sympy"]
    )
    """Modules that are imported and called once, so that runs need not; missing ones are skipped."""
    retries: int = Field(default=2, ge=0)
    """How often an ``infra`` execution is tried again."""
    url: str = ""
    """Not empty: send the code to this service (``retool sandbox serve``, or any that speaks SandboxFusion's HTTP API)
    instead of running it here; the isolation is then the service's own business."""
    token: str = ""
    """What the service wants to see, e.g. ``${RETOOL_SANDBOX_TOKEN}``."""
    concurrency: int = Field(default=64, ge=1)
    """Requests to the service at a time."""

    @field_validator("url")
    @classmethod
    def _reachable(cls, url: str) -> str:
        if "@" in url:
            raise ValueError("sandbox.url holds a user or a password: put the secret into sandbox.token")
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # half an IPv6 address, or a port that is no number
            known = False
        if url and not known:
            raise ValueError(f"sandbox.url = {url!r}: give an address like 'http://127.0.0.1:8080'")
        return url

    @field_validator("token")
    @classmethod
    def _fits_a_header(cls, token: str) -> str:
        if not (token.isascii() and token.isprintable() and token == token.strip()):
            # The value itself is a secret.
            raise ValueError("sandbox.token holds characters that HTTP cannot carry: use letters, digits and signs")
        return token


class RolloutConfig(Section):
    format: Literal["hermes", "code_tags"] = "hermes"
    """hermes: the chat template's own tool calls (JSON). code_tags: the paper's ``<code>``, ``<interpreter>`` and
    ``<answer>`` tags, in one assistant message."""
    prompt_file: str = ""
    """code_tags: a text file that is the whole prompt where the tool is shown, with ``{query}`` for the question, e.g.
    the prompt that a checkpoint was trained with; empty: our own few lines about the tags."""
    tools: bool = True
    """False: text only, the prompt shows no tool and nothing is executed."""
    max_turns: int = Field(default=4, ge=1)
    """Assistant turns."""
    max_response_tokens: int = Field(default=256, ge=1)
    """Sampled and observation tokens."""
    max_context: int = Field(default=640, ge=2)
    """Prompt and response tokens."""
    max_observation_tokens: int = Field(default=64, ge=4)
    max_malformed: int = Field(default=2, ge=0)
    """Malformed calls that a trajectory may make before it ends."""
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> RolloutConfig:
        if self.prompt_file and self.format != "code_tags":
            raise ValueError(
                f"rollout.prompt_file = {self.prompt_file!r} is for rollout.format = 'code_tags': set that"
            )
        if self.max_response_tokens >= self.max_context:
            raise ValueError(
                f"rollout.max_response_tokens = {self.max_response_tokens} leaves no room for a prompt in "
                f"rollout.max_context = {self.max_context}: make max_context larger"
            )
        return self


class EngineConfig(Section):
    kv_budget_mb: int = Field(default=512, ge=1)
    """Memory for the KV cache; the number of live sequences follows from it, the rest wait."""
    max_live: int = Field(default=256, ge=1)
    """Live sequences at most, whatever the budget allows."""
    prefill_chunk: int = Field(default=2048, ge=16)
    """Tokens of prompts and observations computed in one forward pass."""


class OptimConfig(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """muon: Muon on the hidden matrices, AdamW on embeddings and norms."""
    lr: float = Field(default=1e-6, gt=0, allow_inf_nan=False)
    muon_lr: float = Field(default=0.02, gt=0, allow_inf_nan=False)
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after the warm-up, to ``final_lr_share`` at the last step."""
    final_lr_share: float = Field(default=0.0, ge=0, le=1)
    grad_clip: float = Field(default=1.0, gt=0)


class SFTConfig(Section):
    steps: int = Field(default=0, ge=0)
    """Optimiser steps; 0: as many as ``epochs`` of the training file need."""
    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=32, ge=1)
    """Conversations a step."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    max_tokens: int = Field(default=2048, ge=8)
    """Longer conversations are left out and counted."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between in-loop losses on held-out conversations; 0: only at the end."""
    save_every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    optim: OptimConfig = Field(default_factory=OptimConfig)


class CriticConfig(Section):
    """PPO's value model."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    lam: float = Field(default=1.0, ge=0, le=1)
    """GAE's γ and λ."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the critic alone learns."""
    optim: OptimConfig = Field(default_factory=OptimConfig)


class RLConfig(Section):
    algorithm: Literal["grpo", "ppo"] = "grpo"
    """ppo: with a critic; the local engine has none yet, so that it can be planned (``--dry-run``) but not run."""
    steps: int = Field(default=40, ge=1)
    prompts: int = Field(default=32, ge=1)
    """Tasks a step."""
    group_size: int = Field(default=8, ge=1)
    """Trajectories a task (GRPO's G, at least 2)."""
    minibatch_prompts: int = Field(default=0, ge=0)
    """Tasks an optimiser step; 0: all of them, strictly on-policy."""
    micro_batch_tokens: int = Field(default=16384, ge=1)
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.28, gt=0)
    dual_clip: float = Field(default=10.0, gt=1)
    reward: str = Field(default="paper", min_length=1)
    """paper: +1 for a right final answer, −1 otherwise. verl: a wrong one gets up to −0.6 for its calls. Or a function
    of your own, as ``package.module:function``, which takes a graded trajectory and returns a number."""
    grading: Literal["strict", "lenient"] = "strict"
    """strict: the answer is the last ``\\boxed{}`` of the last turn. lenient: where there is none, one from an earlier
    turn, an ``<answer>``, "the answer is …", or the last number."""
    eval_every: int = Field(default=0, ge=0)
    eval_size: int = Field(default=120, ge=1)
    eval_split: Literal["dev", "test"] = "dev"
    """What the evaluations during training read."""
    save_every: int = Field(default=0, ge=0)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    critic: CriticConfig = Field(default_factory=CriticConfig)

    @model_validator(mode="after")
    def _compares(self) -> RLConfig:
        if self.algorithm == "grpo" and self.group_size < 2:
            raise ValueError(f"rl.group_size = {self.group_size}: GRPO compares a task's trajectories; give at least 2")
        return self

    @model_validator(mode="after")
    def _divides(self) -> RLConfig:
        if self.minibatch_prompts and self.prompts % self.minibatch_prompts:
            raise ValueError(
                f"rl.minibatch_prompts = {self.minibatch_prompts} does not divide rl.prompts = {self.prompts}: "
                "choose a divisor, or 0 for one optimiser step"
            )
        return self


class EvalConfig(Section):
    k: int = Field(default=1, ge=1)
    """Samples a problem: mean@k, pass@k, maj@k."""
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    bootstrap: int = Field(default=2000, ge=100)
    """Resamples for the 95 % interval, clustered by problem."""


class Recipe(Section):
    """One file for the three jobs: each reads the sections that it needs."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    sandbox: SandboxConfig = Field(default_factory=SandboxConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    sft: SFTConfig = Field(default_factory=SFTConfig)
    rl: RLConfig = Field(default_factory=RLConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        if self.model.random_init and not self.model.tokenizer:
            raise ValueError("model.random_init needs model.tokenizer: name a tokenizer's folder or hub name")
        return self


_ENV = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _expand_environment(value: Any, field: str) -> Any:
    """Replace ``${NAME}`` and ``${NAME:-default}`` in strings."""
    if isinstance(value, dict):
        return {k: _expand_environment(v, f"{field}.{k}" if field else k) for k, v in value.items()}
    if isinstance(value, list):
        return [_expand_environment(v, field) for v in value]
    if not isinstance(value, str):
        return value

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        found = os.environ.get(name, default)
        if found is None:
            raise ConfigError(f"{field} = {value!r}: the environment variable {name} is not set; set it")
        return found

    return _ENV.sub(replace, value)


def _section_at(parts: Sequence[Any]) -> Any:
    """The model of the section with that path; None where there is none."""
    model: Any = Recipe
    for part in parts:
        known = getattr(model, "model_fields", {})
        model = known[part].annotation if part in known else None
    return model


def _parse_value(text: str, parts: list[str]) -> Any:
    """An override's value as TOML where it is TOML, else as a plain string; a text setting takes what TOML would read
    as a number or a date as it was typed (``run.name=2026-11-22``)."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return text if _section_at(parts) is str and not isinstance(value, str) else value


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set ``section.key=value`` in ``tree``.

    Raises:
        ConfigError: the override is not of that form.
    """
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"override {override!r}: write section.key=value, e.g. rl.steps=10")
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a section")
    node[parts[-1]] = _parse_value(text.strip(), parts)


def _suggest(location: tuple[Any, ...]) -> str:
    """The keys that exist where an unknown one stands, the nearest first."""
    known = list(getattr(_section_at(location[:-1]), "model_fields", {}))
    near = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"did you mean {near[0]!r}?" if near else "known here: " + ", ".join(known)


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{name} = {first['input']!r}: there is no such setting; {_suggest(first['loc'])}"
    if first["type"] == "value_error":
        return str(first["msg"]).removeprefix("Value error, ")
    message = str(first["msg"])
    return f"{name} = {first['input']!r}: {message[0].lower()}{message[1:]}"


def make_recipe(tree: dict[str, Any]) -> Recipe:
    """Check a tree of sections.

    Raises:
        ConfigError: one line that names the field, the value and the mend.
    """
    try:
        return Recipe.model_validate(_expand_environment(tree, ""))
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides, the last one winning.

    Raises:
        ConfigError: the file cannot be read, is not TOML, or says something impossible.
    """
    path = Path(path)
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"recipe {str(path)!r}: {error.strerror or error}; give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} is not TOML: {error}") from None
    for override in overrides:
        apply_override(tree, override)
    return make_recipe(tree)


def recipe_path(name: str | Path) -> Path:
    """The file that ``name`` means: a path first, then a recipe inside the package (``qwen2.5-7b/grpo``).

    Raises:
        ConfigError: it is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {
        file.relative_to(SHIPPED_RECIPES).with_suffix("").as_posix(): file
        for file in sorted(SHIPPED_RECIPES.rglob("*.toml"))
    }
    plain = str(name).removesuffix(".toml").removeprefix("recipes/")
    if plain in shipped:
        return shipped[plain]
    raise ConfigError(
        f"recipe {str(name)!r}: no such file, and not a shipped recipe ({', '.join(shipped) or 'none'}); "
        "give the path of a TOML file"
    )


def recipe_toml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as TOML that ``load_recipe`` reads back to an equal one, but for
    ``sandbox.token``: people keep and share this text, and a secret must not be in it."""
    import tomli_w

    tree = recipe.model_dump(mode="json")
    tree["sandbox"]["token"] = ""
    return tomli_w.dumps(tree)

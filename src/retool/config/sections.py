"""The sections that every job reads: where it runs, what it loads, what it may use."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from retool.config.section import Section


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
    keep_checkpoints: int = Field(default=2, ge=0)
    """The newest checkpoints that are kept, beside the best one by validation; 0: all of them."""
    trackers: list[Literal["tensorboard", "wandb"]] = Field(default_factory=list)
    """Where metrics go besides ``metrics.jsonl``."""
    project: str = Field(default="retool", min_length=1)
    """The project's name at Weights & Biases."""


class LoraConfig(Section):
    """Low-rank adapters (arXiv 2106.09685), through peft."""

    rank: int = Field(default=0, ge=0)
    """0: all weights are trained."""
    alpha: float = Field(default=32.0, gt=0, allow_inf_nan=False)
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: list[str] = Field(default_factory=lambda: ["all-linear"], min_length=1)
    """Names of the modules that get an adapter; ``all-linear``: every linear one but the output head."""
    save_merged: bool = True
    """Every checkpoint is a whole model beside its adapter. False: only the last one is."""


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
    lora: LoraConfig = Field(default_factory=LoraConfig)


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
    """Live sequences at most, whatever the budget allows; on verl, of each sampling server."""
    prefill_chunk: int = Field(default=2048, ge=16)
    """Tokens of prompts and observations computed in one forward pass."""
    gradient_checkpointing: bool = False
    """Each layer's activations are made again in the backward pass: about a third more time, far less memory."""


class EvalConfig(Section):
    k: int = Field(default=1, ge=1)
    """Samples a problem: mean@k, pass@k, maj@k."""
    temperature: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    bootstrap: int = Field(default=2000, ge=100)
    """Resamples for the 95 % interval, clustered by problem."""


class ClusterConfig(Section):
    """The cluster engine, verl on Ray (``--engine verl``). Whatever has no field here or elsewhere in the recipe is
    ``--verl key=value``."""

    nodes: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=8, ge=1)
    address: str = ""
    """The head of a Ray cluster that runs already, as ``host:port``, or ``auto`` for the one that this machine belongs
    to; empty: what RAY_ADDRESS says, else a Ray of the run's own on this machine."""
    rollout: Literal["vllm", "sglang"] = "vllm"
    """What samples."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that share a sampling model."""
    sequence_parallel: int = Field(default=1, ge=1)
    """GPUs that share a sequence in training (Ulysses, arXiv 2309.14509)."""
    critic_sequence_parallel: int = Field(default=0, ge=0)
    """0: as the actor's."""
    offload: bool = False
    """Parameters and the optimiser's state wait in the CPU's memory while they are not used."""
    gpu_memory_share: float = Field(default=0.5, gt=0, lt=1)
    """Of each GPU, for the sampling model and its KV cache."""
    logprob_tokens: int = Field(default=0, ge=0)
    """Tokens of a GPU's micro-batch where nothing is learnt; 0: as ``rl.micro_batch_tokens``."""
    critic_tokens: int = Field(default=0, ge=0)
    """Tokens of a GPU's micro-batch of the critic; 0: as ``rl.micro_batch_tokens``."""
    agent_workers: int = Field(default=8, ge=1)
    """Processes that drive trajectories, spread over the nodes."""

    @field_validator("address")
    @classmethod
    def _reachable(cls, address: str) -> str:
        host, colon, port = address.rpartition(":")
        if address and address != "auto" and not (host and colon and port.isdecimal() and "/" not in host):
            raise ValueError(
                f"cluster.address = {address!r}: give the head's host:port (Ray's own port, 6379 unless you chose "
                "another), or 'auto' on a machine of the cluster"
            )
        return address

    @model_validator(mode="after")
    def _divides(self) -> ClusterConfig:
        gpus = self.nodes * self.gpus_per_node
        for name in ("tensor_parallel", "sequence_parallel", "critic_sequence_parallel"):
            parts = getattr(self, name) or 1
            if gpus % parts:
                raise ValueError(
                    f"cluster.{name} = {parts} does not divide the {gpus} GPUs (cluster.nodes × "
                    "cluster.gpus_per_node): choose a divisor"
                )
        return self

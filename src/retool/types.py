"""Every data type that travels between modules, and the legend of tensor names.

A name that ends in capitals carries its shape, here and in every other module:

    B sequences of a batch    T tokens of a sequence    V vocabulary entries
    G trajectories of a group L layers                  H attention heads
    D width of a head         P tokens of a shared prefix   N tokens of a flat selection

``logprobs_BT[b, t]`` belongs to the token ``ids_BT[b, t]`` itself: it is the log-probability with which that token
was (or would be) sampled, read from the logits at position ``t - 1``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

Message = dict[str, Any]
"""One chat message as chat templates take it: ``{"role": "user", "content": "…"}``; an assistant message may hold
``tool_calls`` (``[{"type": "function", "function": {"name": "code_interpreter", "arguments": {"code": "…"}}}]``)."""


@dataclass(frozen=True)
class Task:
    """One problem with a known answer."""

    id: str
    """Unique in its data set, e.g. ``gsm8k/test/17``."""
    source: str
    """The name under which metrics are grouped, e.g. ``gsm8k``."""
    messages: list[Message]
    """The chat up to the model's first turn."""
    answer: str
    """The truth, as a string, e.g. ``"72"``."""
    meta: dict[str, Any] = field(default_factory=dict)
    """Whatever else the data set knows, e.g. ``{"family": "mul"}``."""


@dataclass(frozen=True)
class SamplingParams:
    """How one turn is sampled."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    max_tokens: int = 256
    """Sampled tokens of this turn at most; at least 1."""
    stop: tuple[str, ...] = ()
    """Strings that end the turn. The token that completes one is kept whole, also where the string ends inside it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the turn; the token is kept."""
    seed: int = 0
    """The turn's random numbers come from (seed, position in the turn) alone, never from what else is in the batch."""


class Finish(StrEnum):
    """Why the policy stopped sampling a turn."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True)
class TokenOutput:
    """What the policy sampled in one turn."""

    token_ids: list[int]
    logprobs: list[float]
    """Aligned with ``token_ids``: log softmax(logits / temperature) of the sampled token, before top-k and top-p
    are applied; at temperature 0 the logits are not scaled."""
    finish: Finish
    policy_version: int = 0
    """How many weight updates the sampling policy had seen."""


class ExecutionStatus(StrEnum):
    """How a run of code ended. All but INFRA say something about the code."""

    OK = "ok"
    ERROR = "error"
    """Non-zero exit code, or an exception."""
    TIMEOUT = "timeout"
    MEMORY = "memory"
    OUTPUT_LIMIT = "output_limit"
    KILLED = "killed"
    """Ended by a signal that neither the deadline nor a limit explains."""
    INFRA = "infra"
    """The sandbox failed, not the code: says nothing about the model."""


@dataclass(frozen=True)
class ExecutionResult:
    """The typed end of one run of code."""

    status: ExecutionStatus
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    """None where there is none (timeout, infra); negative for a signal."""
    duration_s: float = 0.0
    truncated: bool = False
    """True where stdout or stderr is a prefix of what was written."""
    tier: str = ""
    """How strongly the sandbox contained the run: ``full``, ``userns``, ``restricted``; empty where it is not known."""

    @property
    def text(self) -> str:
        """What a model is shown: stdout, then stderr, then one line for an ending that printed nothing itself."""
        parts = [part for part in (self.stdout, self.stderr) if part]
        if self.status is ExecutionStatus.TIMEOUT:
            parts.append("TimeoutError: the code ran out of time")
        elif self.status is ExecutionStatus.MEMORY:
            parts.append("MemoryError: the code ran out of memory")
        elif self.status is ExecutionStatus.OUTPUT_LIMIT:
            parts.append("OutputLimit: the output was cut")
        elif self.status is ExecutionStatus.KILLED:
            parts.append(f"Killed: exit code {self.exit_code}")
        return "\n".join(part.rstrip("\n") for part in parts)


@dataclass(frozen=True)
class ExecutionRequest:
    """One run of code: what it gets, and what it may use. A limit that is None is the sandbox's own.

    Raises:
        ValueError: one line that names the field, the value and the mend.
    """

    code: str
    timeout_s: float
    """Wall-clock seconds."""
    stdin: bytes = b""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """Put into the working folder before the code runs; names are relative paths, e.g. ``data/a.csv``."""
    fetch: tuple[str, ...] = ()
    """Files to bring back from the working folder when all the run's processes are dead."""
    session: str = ""
    """Not empty: the run goes on in the interpreter that earlier runs of this session left behind."""
    cpu_s: float | None = None
    """CPU seconds of each process."""
    memory_mb: int | None = None
    output_kb: int | None = None
    """KiB of stdout, and again of stderr."""
    file_mb: int | None = None
    """Size of each file that the run writes."""
    processes: int | None = None
    """Processes and threads at a time."""

    def __post_init__(self) -> None:
        for name in ("timeout_s", "cpu_s"):
            seconds = getattr(self, name)
            if seconds is not None and not (math.isfinite(seconds) and seconds > 0):
                raise ValueError(f"{name} = {seconds!r}: give a positive, finite number of seconds")
        for name in ("memory_mb", "output_kb", "file_mb", "processes"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ValueError(f"{name} = {limit!r}: give at least 1")
        for name in (*self.files, *self.fetch):
            if not is_inner_path(name):
                raise ValueError(f"file name {name[:100]!r}: give a relative path without '..', as in 'data/a.csv'")


MAX_PATH_BYTES = 1024
"""Of a file that goes into a run or comes back: far below the kernel's PATH_MAX of 4096."""
_MAX_NAME_BYTES = 255  # NAME_MAX


def is_inner_path(name: str) -> bool:
    """Whether ``name`` can only mean something below the folder that it is relative to (symbolic links apart)."""
    try:
        size = len(name.encode())
        parts = [part.encode() for part in name.split("/")]
    except UnicodeEncodeError:
        return False
    plain = all(part not in (b"", b".", b"..") and len(part) <= _MAX_NAME_BYTES for part in parts)
    return plain and size <= MAX_PATH_BYTES and "\0" not in name


@dataclass(frozen=True)
class Execution:
    """What came of an ``ExecutionRequest``."""

    result: ExecutionResult
    files: Mapping[str, bytes] = field(default_factory=dict)
    """By name, those of ``fetch`` that could be brought back."""
    not_fetched: Mapping[str, str] = field(default_factory=dict)
    """By name, why the others were not, e.g. ``a symbolic link``."""


@dataclass(frozen=True)
class ToolCall:
    """One call found in a turn's text: either ``code`` to run, or ``error`` saying why it cannot be."""

    code: str | None
    error: str | None = None
    raw: str = ""
    """The text between the call's delimiters, as sampled."""


@dataclass(frozen=True)
class Turn:
    """What the model sampled, what came of it, and what it was shown next."""

    output: TokenOutput
    text: str = ""
    """``output.token_ids`` decoded, for people and graders; never encoded again."""
    calls: list[ToolCall] = field(default_factory=list)
    executions: list[ExecutionResult | None] = field(default_factory=list)
    """Aligned with ``calls``; None for a malformed call."""
    observation_ids: list[int] = field(default_factory=list)
    """Tokens that the environment appended after the turn; empty after the last one."""
    observation_text: str = ""


class StopReason(StrEnum):
    """How a trajectory ended."""

    ANSWERED = "answered"
    """A turn without a call ended by itself."""
    MAX_TURNS = "max_turns"
    MAX_TOKENS = "max_tokens"
    """The response (sampled and observation tokens) reached its limit."""
    CONTEXT_FULL = "context_full"
    MALFORMED = "malformed"
    """More malformed calls than the rollout allows."""
    INFRA = "infra"
    """The machine failed: left out of the group, never learnt from."""


@dataclass(frozen=True)
class Grade:
    """What the grader found."""

    correct: bool
    prediction: str | None = None
    """The extracted answer; None where there was none."""


@dataclass
class Trajectory:
    """One sampled attempt at a task. ``ids = prompt + Σ(sampled ids + observation ids)``, only ever appended to.

    Read ``ids_T``, ``mask_T`` and ``logprobs_T`` once the trajectory is complete: they are derived once and kept."""

    task: Task
    sample: int
    """Which of its group's trajectories this is."""
    prompt_ids: list[int]
    turns: list[Turn] = field(default_factory=list)
    stop_reason: StopReason | None = None
    reward: float = 0.0
    grade: Grade | None = None
    advantage: float | None = None
    """Set by the learner; None where the trajectory was not learnt from."""
    sandbox_s: float = 0.0
    """Seconds that the trajectory waited for its code."""

    @cached_property
    def ids_T(self) -> list[int]:
        ids = list(self.prompt_ids)
        for turn in self.turns:
            ids += turn.output.token_ids
            ids += turn.observation_ids
        return ids

    @cached_property
    def mask_T(self) -> list[int]:
        """1 exactly on sampled tokens."""
        mask = [0] * len(self.prompt_ids)
        for turn in self.turns:
            mask += [1] * len(turn.output.token_ids)
            mask += [0] * len(turn.observation_ids)
        return mask

    @cached_property
    def logprobs_T(self) -> list[float]:
        """The sampling policy's, on sampled tokens; 0.0 elsewhere."""
        logprobs = [0.0] * len(self.prompt_ids)
        for turn in self.turns:
            logprobs += turn.output.logprobs
            logprobs += [0.0] * len(turn.observation_ids)
        return logprobs

    @property
    def response_length(self) -> int:
        """Tokens after the prompt, sampled and observed."""
        return sum(len(t.output.token_ids) + len(t.observation_ids) for t in self.turns)

    @property
    def sampled_length(self) -> int:
        """Tokens that the policy sampled."""
        return sum(len(t.output.token_ids) for t in self.turns)

    @property
    def num_calls(self) -> int:
        """Calls in the text, malformed ones included."""
        return sum(len(t.calls) for t in self.turns)

    @property
    def num_turns(self) -> int:
        """verl's definition: user + assistant + tool-answer messages, so calls ≈ (num_turns − 2) / 2."""
        return 1 + len(self.turns) + sum(1 for t in self.turns if t.observation_ids)


@dataclass
class TrajectoryGroup:
    """The G trajectories of one task, less those that the infrastructure lost."""

    task: Task
    trajectories: list[Trajectory]
    infra_failed: list[Trajectory] = field(default_factory=list)
    """Kept for the log, never learnt from."""


@dataclass(frozen=True)
class Conversation:
    """One supervised example: a chat whose assistant turns are learnt."""

    id: str
    messages: list[Message]
    tools: bool = True
    """Whether the prompt shows the tool."""

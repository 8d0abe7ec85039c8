"""The seams: what a rollout needs of a model, a sandbox, a text format and a grader. A scripted stand-in for each is
enough to test everything above them."""

from __future__ import annotations

from typing import Protocol

from retool.types import ExecutionResult, Grade, Message, SamplingParams, Task, TokenOutput, ToolCall, Trajectory


class Policy(Protocol):
    """Samples tokens. A session is one trajectory's identity: the policy may keep its KV cache between calls."""

    async def generate(self, ids: list[int], params: SamplingParams, *, session: str) -> TokenOutput:
        """Continue ``ids`` (all the tokens so far). Within a session, each call's ids begin with the ids of the call
        before plus what that call returned."""
        ...

    def release(self, session: str) -> None:
        """The session is over; forget what was kept for it. Unknown sessions are ignored."""
        ...

    def interrupt(self) -> None:
        """End every turn that is being sampled, with the tokens so far and ``Finish.ABORT``."""
        ...


class Sandbox(Protocol):
    """Runs code that nobody trusts."""

    async def execute(self, code: str, timeout_s: float, *, session: str = "") -> ExecutionResult:
        """Run ``code`` as a Python program. Never raises for what the code did; a fault of the sandbox itself comes
        back as ``ExecutionStatus.INFRA``. Cancelling the call kills the run.

        With a ``session`` the code goes on in the interpreter that the session's earlier runs left behind.

        Raises:
            ValueError: ``timeout_s`` is not a positive, finite number.
        """
        ...

    def release(self, session: str) -> None:
        """The session is over: end its interpreter. Unknown sessions are ignored."""
        ...

    async def close(self) -> None:
        """Kill everything that still runs and leave nothing behind."""
        ...


class ToolFormat(Protocol):
    """How chats, calls and tool answers look as tokens."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a turn where the prompt shows the tool."""
        ...

    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...

    def prompt_ids(self, messages: list[Message], *, tools: bool = True) -> list[int]:
        """The prompt, up to and with the opening of the assistant's turn. ``tools=False`` leaves the tool out."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """Text for people and graders; never encoded again."""
        ...

    def find_calls(self, text: str) -> list[ToolCall]:
        """The calls in one turn's decoded text, in order; malformed ones carry an error."""
        ...

    def is_over(self, text: str) -> bool:
        """Whether a turn that a stop string ended is over; where that string belongs to a call that is still being
        written, it is not."""
        ...

    def observation_ids(self, results: list[str], output: TokenOutput) -> list[int]:
        """The tokens to append after a turn (``output``), from the end of the turn to the opening of the next
        assistant turn, for one result text per call."""
        ...

    def conversation_ids(self, messages: list[Message], *, tools: bool = True) -> tuple[list[int], list[int]]:
        """A whole chat for supervised learning as ``(ids_T, mask_T)``: exactly the ids and the mask that a rollout of
        the same turns would have."""
        ...

    def truncate(self, text: str, max_tokens: int) -> str:
        """``text`` cut in the middle, with a marker, to at most ``max_tokens`` tokens."""
        ...


class Grader(Protocol):
    """Judges a finished trajectory."""

    def grade(self, trajectory: Trajectory) -> Grade: ...


class Tracker(Protocol):
    """Takes a step's metrics. One that fails must not end a run."""

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


__all__ = ["Grader", "Policy", "Sandbox", "Task", "ToolFormat", "Tracker"]

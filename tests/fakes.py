"""Stand-ins for a model, a sandbox and a tokenizer: enough to test everything above the seams."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import retool.nano
from retool.types import ExecutionResult, ExecutionStatus, Finish, SamplingParams, TokenOutput


def hear_ctrl_c() -> None:
    """For ``preexec_fn``: a program whose caller ignores Ctrl-C (a shell's background job, some CI runners) would
    inherit that, and a test could not send it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


NANO_TEMPLATE = (Path(retool.nano.__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")


def tiny_tokenizer(template: str = NANO_TEMPLATE, special: tuple[str, ...] = SPECIAL) -> PreTrainedTokenizerFast:
    """One token a byte, besides the control tokens and the tags. The last of ``special`` ends a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[-1], pad_token=special[0])
    wrapped.chat_template = template
    return wrapped


class Asked(NamedTuple):
    """One call of ``generate``."""

    ids: list[int]
    params: SamplingParams
    session: str


class ScriptedPolicy:
    """Says what a script says: ``script(session, turn)`` is a turn's ids, which are cut to ``max_tokens``, or the whole
    output. An exception in it is raised by ``generate``.

    The protocol's promise is checked: within a session, ids only grow by what was returned and what comes after it.
    Every log-probability is a different number, so that one in the wrong place shows.
    """

    def __init__(self, script: Callable[[str, int], list[int] | TokenOutput], *, pause: bool = False) -> None:
        self.script = script
        self.pause = pause
        self.asked: list[Asked] = []
        self.outputs: list[TokenOutput] = []
        self.released: Counter[str] = Counter()
        self._turns: Counter[str] = Counter()
        self._so_far: dict[str, list[int]] = {}
        self._logprob = 0.0

    async def generate(self, ids: list[int], params: SamplingParams, *, session: str) -> TokenOutput:
        before = self._so_far.get(session, [])
        assert ids[: len(before)] == before, "the ids do not begin with those of the call before and what it returned"
        self.asked.append(Asked(list(ids), params, session))
        turn = self._turns[session]
        self._turns[session] += 1
        if self.pause:
            await asyncio.sleep(0)
        said = self.script(session, turn)
        output = said if isinstance(said, TokenOutput) else self._output(said, params)
        self._so_far[session] = ids + output.token_ids
        self.outputs.append(output)
        return output

    def _output(self, ids: list[int], params: SamplingParams) -> TokenOutput:
        finish = Finish.STOP if len(ids) <= params.max_tokens else Finish.LENGTH
        kept = ids[: params.max_tokens]
        logprobs = []
        for _ in kept:
            self._logprob -= 0.001
            logprobs.append(self._logprob)
        return TokenOutput(kept, logprobs, finish)

    def release(self, session: str) -> None:
        self.released[session] += 1
        self._so_far.pop(session, None)

    @property
    def open_sessions(self) -> set[str]:
        """Sessions that were used and not released."""
        return {asked.session for asked in self.asked} - set(self.released)


class ScriptedSandbox:
    """Answers code by ``answers``: a mapping from code to a result (or to stdout), or a function of (code, how often it
    has been run). ``held`` keeps every run waiting until the event is set."""

    def __init__(
        self,
        answers: Mapping[str, ExecutionResult | str] | Callable[[str, int], ExecutionResult | str],
        *,
        held: bool = False,
    ) -> None:
        self._answers = answers
        self.held = held
        self.go: asyncio.Event | None = None
        self.runs: list[tuple[str, float]] = []
        self.sessions: list[str] = []
        """Of each run, aligned with ``runs``."""
        self.released: Counter[str] = Counter()
        self.running = 0
        self.most_running = 0
        self.cancelled = 0
        self.closed = False

    async def execute(self, code: str, timeout_s: float, *, session: str = "") -> ExecutionResult:
        count = sum(1 for ran, _ in self.runs if ran == code)
        self.runs.append((code, timeout_s))
        self.sessions.append(session)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if self.held:
                self.go = self.go or asyncio.Event()
                await self.go.wait()
            else:
                await asyncio.sleep(0)
            answer: Any = self._answers(code, count) if callable(self._answers) else self._answers[code]
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return ok(answer) if isinstance(answer, str) else answer

    def release(self, session: str) -> None:
        self.released[session] += 1

    async def close(self) -> None:
        self.closed = True


def ok(stdout: str) -> ExecutionResult:
    return ExecutionResult(ExecutionStatus.OK, stdout=stdout, exit_code=0)


def infra() -> ExecutionResult:
    return ExecutionResult(ExecutionStatus.INFRA)

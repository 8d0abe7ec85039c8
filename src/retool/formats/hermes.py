"""The Hermes format over any tokenizer whose chat template knows tools (Qwen2.5, Qwen3, …): calls are JSON between the
template's own tags, and each result is a message of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from retool.errors import ConfigError
from retool.formats.calls import TOOL_SCHEMA, find_calls, tool_call
from retool.formats.chat import CUT_MARKER, ChatFormat, blank, sentinel, turns_of, user
from retool.formats.encoding import Span, TokenMatcher
from retool.types import Message, TokenOutput, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class HermesFormat(ChatFormat):
    """``protocols.ToolFormat`` for a chat template that shows tools, calls and their results.

    Raises:
        ConfigError: the tokenizer has no chat template, or the template cannot carry this format.
    """

    tool_schemas = (TOOL_SCHEMA,)

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer)
        self._turn_tokens = self._find_turn_tokens()

    def _find_turn_tokens(self) -> TokenMatcher:
        """The added tokens that an assistant's text may hold: ordinary ones, and those that the template itself writes
        into a turn with a call; never one that ends the turn."""
        call = self._render([user(0), _caller(1, 1)]).partition(sentinel(0))[2]
        written = set(self._encoder.all_tokens.split(self._cut_turn(call, self._closing)[1]))
        ordinary = {i for i, token in self._encoder.added.items() if not token.special}
        allowed = ordinary | {part for part in written if isinstance(part, int)}
        return TokenMatcher(self.tokenizer, allowed - set(self.stop_token_ids))

    @property
    def stop(self) -> tuple[str, ...]:
        """Empty: a turn ends at a token, so that several calls fit in one and a tag inside code ends nothing."""
        return ()

    def find_calls(self, text: str) -> list[ToolCall]:
        """The calls in one turn's decoded text, in order; malformed ones carry an error."""
        return find_calls(text)

    def is_over(self, text: str) -> bool:
        return True

    def observation_ids(self, results: list[str], output: TokenOutput) -> list[int]:
        """The tokens to append after ``output``: the end of the turn if it was not sampled (a turn may end with the
        tokenizer's eos instead), one tool response per result, and the opening of the next assistant turn.

        The results' text never becomes an added token. Where a response's own tags are plain text in the template
        (Qwen2.5's ``</tool_response>``), a result can spell them, but no turn can be ended or opened.

        Raises:
            ValueError: there is no result.
        """
        if not results:
            raise ValueError("results: an observation answers at least one call")
        ended = bool(output.token_ids) and output.token_ids[-1] == self.end_id
        tool_messages: list[Message] = [{"role": "tool", "content": text} for text in results]
        return ([] if ended else [self.end_id]) + self._environment_ids(tool_messages)

    def turn_ids(self, message: Message, following: Sequence[Message] = ()) -> list[int]:
        """An assistant message as the tokens that a model would have sampled, the turn's end included.

        ``following`` are the messages up to the next assistant turn: a template may show a last turn differently.

        Raises:
            ConfigError: the template does not open or end this turn as it does others.
        """
        opened, text, closed = self._cut_turn(*self._render_turn(message, following))
        if not (opened and closed):
            raise ConfigError("chat template: an assistant message does not begin and end as the template's turns do")
        return [*self._encoder.encode([Span(text, self._turn_tokens)]), self.end_id]

    def _pieces(self, messages: list[Message]) -> Iterator[tuple[list[int], int]]:
        for message, following in turns_of(messages):
            yield self.turn_ids(message, following), 1
            if following:
                yield self._environment_ids(following), 0

    def _turn_before(self, first: int, roles: tuple[str, ...]) -> Message:
        return _caller(first, roles.count("tool"))

    def _render_turn(self, message: Message, following: Sequence[Message]) -> tuple[str, str]:
        """What is rendered from the first user message on, and how that ends after the turn's text."""
        roles = tuple(str(m["role"]) for m in following)
        rendering = self._render(
            [user(len(roles)), _normalised(message), *blank(roles)], tools=True, opening=bool(roles)
        )
        closing = self._end_text + self._between(roles) if roles else self._closing
        return rendering.partition(sentinel(len(roles)))[2], closing

    def _cut_turn(self, rendering: str, closing: str) -> tuple[bool, str, bool]:
        """Whether the turn is opened as usual, its text, and whether it ends as expected."""
        text = rendering.removeprefix(self._opening)
        return rendering.startswith(self._opening), text.removesuffix(closing), text.endswith(closing)


def _caller(first: int, calls: int) -> Message:
    """An assistant turn whose content and ``calls`` calls hold sentinels ``first``, ``first + 1``, …"""
    codes = [sentinel(first + 1 + index) for index in range(calls)]
    message: Message = {"role": "assistant", "content": sentinel(first)}
    if codes:
        message["tool_calls"] = [tool_call(code) for code in codes]
    return message


def _normalised(message: Message) -> Message:
    """An assistant message as templates expect it: content a string, arguments an object."""
    normal: Message = {**message, "content": message.get("content") or ""}
    calls = []
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        arguments = function["arguments"]
        # Chat APIs carry arguments as a JSON string; a template would quote that once more.
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        calls.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    normal.pop("tool_calls", None)
    return {**normal, "tool_calls": calls} if calls else normal


__all__ = ["CUT_MARKER", "HermesFormat"]

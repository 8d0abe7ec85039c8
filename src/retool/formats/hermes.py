"""The Hermes format over any tokenizer whose chat template knows tools (Qwen2.5, Qwen3, …).

Nothing here knows a template's text. Everything is read off renderings in which messages hold sentinels: what stands
after a turn's sentinel is what the environment writes next, also where a template rewrites earlier turns (Qwen3 drops
their ``<think>`` blocks; a rollout keeps what was sampled).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from retool.errors import ConfigError, DataError
from retool.formats.calls import TOOL_NAME, TOOL_SCHEMA, find_calls
from retool.formats.encoding import Encoder, Span, TokenMatcher
from retool.types import Message, TokenOutput, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Letters and digits alone pass unchanged through ``tojson``, ``trim`` and any other filter of a template.
_SENTINEL = "ReTool7f3aSentinel{}End"
_SENTINEL_PATTERN = re.compile(_SENTINEL.format(r"(\d+)"))
CUT_MARKER = "\n[...]\n"


def _sentinel(index: int) -> str:
    return _SENTINEL.format(index)


class HermesFormat:
    """``protocols.ToolFormat`` for a chat template.

    Raises:
        ConfigError: the tokenizer has no chat template, or the template cannot carry this format.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.chat_template:
            raise ConfigError("tokenizer: it has no chat template; add one to tokenizer_config.json")
        self.tokenizer = tokenizer
        self._encoder = Encoder(tokenizer)
        self._opening = self._render([_user(0)], opening=True).partition(_sentinel(0))[2]
        closing = self._render([_user(0), {"role": "assistant", "content": _sentinel(1)}]).partition(_sentinel(1))[2]
        parts = self._encoder.all_tokens.split(closing)
        if len(parts) < 2 or parts[0] != "" or not isinstance(parts[1], int):
            raise ConfigError(f"chat template: no token ends the assistant's turn (after it stands {closing!r})")
        self.end_id = parts[1]
        """The token that ends a turn."""
        self._end_text = self._encoder.added[self.end_id].content
        self._closing = closing
        # A rendering is a function of the messages' roles alone, since every content is a sentinel.
        self._between = cache(self._render_between)
        self._turn_tokens = self._find_turn_tokens()

    def _find_turn_tokens(self) -> TokenMatcher:
        """The added tokens that an assistant's text may hold: ordinary ones, and those that the template itself writes
        into a turn with a call; never one that ends the turn."""
        call = self._render([_user(0), _caller(1, 1)]).partition(_sentinel(0))[2]
        written = set(self._encoder.all_tokens.split(self._cut_turn(call, self._closing)[1]))
        ordinary = {i for i, token in self._encoder.added.items() if not token.special}
        allowed = ordinary | {part for part in written if isinstance(part, int)}
        return TokenMatcher(self.tokenizer, allowed - set(self.stop_token_ids))

    @property
    def stop(self) -> tuple[str, ...]:
        """Empty: a turn ends at a token, so that several calls fit in one and a tag inside code ends nothing."""
        return ()

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        eos = self.tokenizer.eos_token_id
        return (self.end_id,) if not isinstance(eos, int) or eos == self.end_id else (self.end_id, eos)

    def prompt_ids(self, messages: list[Message], *, tools: bool = True) -> list[int]:
        """The prompt, up to and with the opening of the assistant's turn.

        Raises:
            DataError: the chat does not end with a message to the assistant, or a content is not a string.
        """
        if not messages or messages[-1].get("role") == "assistant":
            raise DataError("chat: it must end with a message to the assistant; drop the last answer")
        return self._assemble(messages, tools)[0]

    def decode(self, token_ids: list[int]) -> str:
        """Text for people and graders, less the tokens that end a turn at its end; other control tokens are shown."""
        kept = len(token_ids)
        while kept and token_ids[kept - 1] in self.stop_token_ids:
            kept -= 1
        text = self.tokenizer.decode(token_ids[:kept], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

    def find_calls(self, text: str) -> list[ToolCall]:
        """The calls in one turn's decoded text, in order; malformed ones carry an error."""
        return find_calls(text)

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

    def conversation_ids(self, messages: list[Message], *, tools: bool = True) -> tuple[list[int], list[int]]:
        """A whole chat for supervised learning as ``(ids_T, mask_T)``: exactly the ids and the mask that a rollout of
        the same turns would have.

        Raises:
            DataError: the chat does not end with an assistant message, or its turns do not alternate.
        """
        if not messages or messages[-1].get("role") != "assistant":
            raise DataError("chat: it must end with an assistant message to learn from")
        return self._assemble(messages, tools)

    def truncate(self, text: str, max_tokens: int) -> str:
        """``text`` cut in the middle, with a marker, to at most ``max_tokens`` tokens; cut at its end, without one,
        where the marker does not fit."""
        encoding = self._encoder.plain(text)
        if len(encoding.ids) <= max_tokens:
            return text
        room = max_tokens - len(self._encoder.plain(CUT_MARKER).ids)
        # Parts that were cut apart may need a few more tokens than they had together: less is kept until they fit.
        for marker, keeps in ((CUT_MARKER, range(room, 1, -1)), ("", range(max_tokens, 0, -1))):
            for keep in keeps:
                head, tail = (keep - keep // 2, keep // 2) if marker else (keep, 0)
                # Offsets count characters of ``text``: a cut inside a character's bytes keeps the character whole.
                cut = text[: encoding.offsets[head - 1][1]] + marker
                cut += text[encoding.offsets[-tail][0] :] if tail else ""
                if len(self._encoder.plain(cut).ids) <= max_tokens:
                    return cut
        return ""

    def _render(self, messages: list[Message], *, tools: bool = True, opening: bool = False) -> str:
        rendered = self.tokenizer.apply_chat_template(
            messages, tools=[TOOL_SCHEMA] if tools else None, tokenize=False, add_generation_prompt=opening
        )
        return str(rendered)

    def _fill(self, rendering: str, contents: Sequence[str]) -> list[Span]:
        """A rendering's spans, with the contents in the place of their sentinels."""
        spans = []
        for index, part in enumerate(_SENTINEL_PATTERN.split(rendering)):
            spans.append(Span(contents[int(part)]) if index % 2 else Span(part, self._encoder.all_tokens))
        return spans

    def _render_between(self, roles: tuple[str, ...]) -> str:
        """What stands between the end-of-turn token and the next assistant turn's text; message i holds sentinel i."""
        calls = roles.count("tool")
        before: list[Message] = [_user(len(roles)), _caller(len(roles) + 1, calls)]
        rendering = self._render([*before, *_blank(roles)], opening=True)
        last = _sentinel(len(roles) + 1 + calls)
        found, _, tail = rendering.rpartition(last)
        _, ended, after = tail.partition(self._end_text)
        if not found or not ended or sum(1 for _ in _SENTINEL_PATTERN.finditer(after)) != len(roles):
            raise ConfigError(f"chat template: it does not show messages of the roles {', '.join(roles)} after a call")
        return after

    def _environment_ids(self, messages: Sequence[Message]) -> list[int]:
        between = self._between(tuple(str(message["role"]) for message in messages))
        return self._encoder.encode(self._fill(between, [_content(message) for message in messages]))

    def _render_turn(self, message: Message, following: Sequence[Message]) -> tuple[str, str]:
        """What is rendered from the first user message on, and how that ends after the turn's text."""
        roles = tuple(str(m["role"]) for m in following)
        rendering = self._render(
            [_user(len(roles)), _normalised(message), *_blank(roles)], tools=True, opening=bool(roles)
        )
        closing = self._end_text + self._between(roles) if roles else self._closing
        return rendering.partition(_sentinel(len(roles)))[2], closing

    def _cut_turn(self, rendering: str, closing: str) -> tuple[bool, str, bool]:
        """Whether the turn is opened as usual, its text, and whether it ends as expected."""
        text = rendering.removeprefix(self._opening)
        return rendering.startswith(self._opening), text.removesuffix(closing), text.endswith(closing)

    def _assemble(self, messages: list[Message], tools: bool) -> tuple[list[int], list[int]]:
        """Ids and mask of a chat, made of the same pieces as a rollout's."""
        first = next((i for i, message in enumerate(messages) if message.get("role") == "assistant"), len(messages))
        if first == 0:
            raise DataError("chat: it begins with an assistant message; begin with a system or user message")
        head = messages[:first]
        rendering = self._render(_blank(tuple(str(message["role"]) for message in head)), tools=tools, opening=True)
        ids = self._encoder.encode(self._fill(rendering, [_content(message) for message in head]))
        mask = [0] * len(ids)
        position = first
        while position < len(messages):
            following = list[Message]()
            for message in messages[position + 1 :]:
                if message.get("role") == "assistant":
                    break
                following.append(message)
            turn = self.turn_ids(messages[position], following)
            ids, mask = ids + turn, mask + [1] * len(turn)
            position += 1 + len(following)
            if following:
                environment = self._environment_ids(following)
                ids, mask = ids + environment, mask + [0] * len(environment)
            elif position < len(messages):
                raise DataError("chat: two assistant messages stand in a row; merge them")
        return ids, mask


def _user(sentinel: int) -> Message:
    return {"role": "user", "content": _sentinel(sentinel)}


def _caller(first: int, calls: int) -> Message:
    """An assistant turn whose content and ``calls`` calls hold sentinels ``first``, ``first + 1``, …"""
    codes = [_sentinel(first + 1 + index) for index in range(calls)]
    message: Message = {"role": "assistant", "content": _sentinel(first)}
    if codes:
        message["tool_calls"] = [_call({"code": code}) for code in codes]
    return message


def _call(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": TOOL_NAME, "arguments": arguments}}


def _blank(roles: tuple[str, ...]) -> list[Message]:
    return [{"role": role, "content": _sentinel(index)} for index, role in enumerate(roles)]


def _content(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise DataError(f"chat: the content of a {message.get('role')!r} message must be a string")
    return content


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

"""What every chat format shares: a tokenizer's chat template, read off renderings in which messages hold sentinels.

Nothing here knows a template's text. What stands after a turn's sentinel is what the environment writes next, also
where a template rewrites earlier turns (Qwen3 drops their ``<think>`` blocks; a rollout keeps what was sampled).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from retool.errors import ConfigError, DataError
from retool.formats.encoding import Encoder, Span
from retool.types import Message, TokenOutput, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Letters and digits alone pass unchanged through ``tojson``, ``trim`` and any other filter of a template.
_SENTINEL = "ReTool7f3aSentinel{}End"
_SENTINEL_PATTERN = re.compile(_SENTINEL.format(r"(\d+)"))
CUT_MARKER = "\n[...]\n"


class ChatFormat(ABC):
    """``protocols.ToolFormat`` over a chat template, but for how a turn, a call and its answer look.

    Raises:
        ConfigError: the tokenizer has no chat template, or the template cannot carry a format.
    """

    tool_schemas: tuple[dict[str, Any], ...] = ()
    """What the template itself is told of tools."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.chat_template:
            raise ConfigError("tokenizer: it has no chat template; add one to tokenizer_config.json")
        self.tokenizer = tokenizer
        self._encoder = Encoder(tokenizer)
        self._opening = self._render([user(0)], opening=True).partition(sentinel(0))[2]
        closing = self._render([user(0), {"role": "assistant", "content": sentinel(1)}]).partition(sentinel(1))[2]
        parts = self._encoder.all_tokens.split(closing)
        if len(parts) < 2 or parts[0] != "" or not isinstance(parts[1], int):
            raise ConfigError(f"chat template: no token ends the assistant's turn (after it stands {closing!r})")
        self.end_id = parts[1]
        """The token that ends a turn."""
        self._end_text = self._encoder.added[self.end_id].content
        self._closing = closing
        # A rendering is a function of the messages' roles alone, since every content is a sentinel.
        self._between = cache(self._render_between)

    @property
    @abstractmethod
    def stop(self) -> tuple[str, ...]:
        """Strings that end a turn where the prompt shows the tool."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        eos = self.tokenizer.eos_token_id
        return (self.end_id,) if not isinstance(eos, int) or eos == self.end_id else (self.end_id, eos)

    @abstractmethod
    def find_calls(self, text: str) -> list[ToolCall]:
        """The calls in one turn's decoded text, in order; malformed ones carry an error."""

    @abstractmethod
    def is_over(self, text: str) -> bool:
        """Whether a turn that a stop string ended is over; where that string belongs to a call that is still being
        written, it is not."""

    @abstractmethod
    def observation_ids(self, results: list[str], output: TokenOutput) -> list[int]:
        """The tokens to append after ``output``, for one result text per call."""

    @abstractmethod
    def _pieces(self, messages: list[Message]) -> Iterator[tuple[list[int], int]]:
        """A chat's ids after its head, in pieces, each with its mask: assistants' turns (1) and what the environment
        writes between them (0)."""

    def _show_tool(self, head: list[Message]) -> list[Message]:
        """The messages before the assistant's first turn, as they are where the prompt shows the tool."""
        return head

    def prompt_ids(self, messages: list[Message], *, tools: bool = True) -> list[int]:
        """The prompt, up to and with the opening of the assistant's turn.

        Raises:
            DataError: the chat does not end with a message to the assistant, or a content is not a string.
        """
        if not messages or messages[-1].get("role") == "assistant":
            raise DataError("chat: it must end with a message to the assistant; drop the last answer")
        return self._assemble(messages, tools)[0]

    def conversation_ids(self, messages: list[Message], *, tools: bool = True) -> tuple[list[int], list[int]]:
        """A whole chat for supervised learning as ``(ids_T, mask_T)``: exactly the ids and the mask that a rollout of
        the same turns would have.

        Raises:
            DataError: the chat does not end with an assistant message, or its turns do not alternate.
        """
        if not messages or messages[-1].get("role") != "assistant":
            raise DataError("chat: it must end with an assistant message to learn from")
        return self._assemble(messages, tools)

    def decode(self, token_ids: list[int]) -> str:
        """Text for people and graders, less the tokens that end a turn at its end; other control tokens are shown."""
        kept = len(token_ids)
        while kept and token_ids[kept - 1] in self.stop_token_ids:
            kept -= 1
        text = self.tokenizer.decode(token_ids[:kept], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)

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

    def _assemble(self, messages: list[Message], tools: bool) -> tuple[list[int], list[int]]:
        """Ids and mask of a chat, made of the same pieces as a rollout's."""
        first = next((i for i, message in enumerate(messages) if message.get("role") == "assistant"), len(messages))
        if first == 0:
            raise DataError("chat: it begins with an assistant message; begin with a system or user message")
        head = self._show_tool(messages[:first]) if tools else messages[:first]
        rendering = self._render(blank(tuple(str(message["role"]) for message in head)), tools=tools, opening=True)
        ids = self._encoder.encode(self._fill(rendering, [content_of(message) for message in head]))
        mask = [0] * len(ids)
        for piece, learnt in self._pieces(messages[first:]):
            ids, mask = ids + piece, mask + [learnt] * len(piece)
        return ids, mask

    def _environment_ids(self, messages: Sequence[Message]) -> list[int]:
        """From behind the token that ends a turn to the opening of the next one."""
        between = self._between(tuple(str(message["role"]) for message in messages))
        return self._encoder.encode(self._fill(between, [content_of(message) for message in messages]))

    def _render(self, messages: list[Message], *, tools: bool = True, opening: bool = False) -> str:
        rendered = self.tokenizer.apply_chat_template(
            messages,
            tools=list(self.tool_schemas) if tools and self.tool_schemas else None,
            tokenize=False,
            add_generation_prompt=opening,
        )
        return str(rendered)

    def _fill(self, rendering: str, contents: Sequence[str]) -> list[Span]:
        """A rendering's spans, with the contents in the place of their sentinels."""
        spans = []
        for index, part in enumerate(_SENTINEL_PATTERN.split(rendering)):
            spans.append(Span(contents[int(part)]) if index % 2 else Span(part, self._encoder.all_tokens))
        return spans

    def _turn_before(self, first: int, roles: tuple[str, ...]) -> Message:
        """The assistant's turn that messages of these roles follow, its texts sentinels ``first``, ``first + 1``, …"""
        return {"role": "assistant", "content": sentinel(first)}

    def _render_between(self, roles: tuple[str, ...]) -> str:
        """What stands between the end-of-turn token and the next assistant turn's text; message i holds sentinel i."""
        turn = self._turn_before(len(roles) + 1, roles)
        calls = len(turn.get("tool_calls", ()))
        rendering = self._render([user(len(roles)), turn, *blank(roles)], opening=True)
        # A template may rewrite an earlier turn's prose, so its end is looked for from behind.
        before, found, _ = rendering.partition(sentinel(0))
        spoken, ended, _ = before.rpartition(self._end_text)
        after = rendering[len(spoken) + len(ended) :]
        shown = sum(1 for _ in _SENTINEL_PATTERN.finditer(after))
        lost = calls and sentinel(len(roles) + 1 + calls) not in spoken
        if not found or not ended or shown != len(roles) or lost:
            raise ConfigError(f"chat template: it does not show messages of the roles {', '.join(roles)} after a turn")
        return after


def turns_of(messages: Sequence[Message]) -> Iterator[tuple[Message, list[Message]]]:
    """A chat's assistant messages, each with the messages between it and the next one.

    Raises:
        DataError: two assistant messages stand in a row.
    """
    position = 0
    while position < len(messages):
        following = list[Message]()
        for message in messages[position + 1 :]:
            if message.get("role") == "assistant":
                break
            following.append(message)
        if not following and position + 1 < len(messages):
            raise DataError("chat: two assistant messages stand in a row; merge them")
        yield messages[position], following
        position += 1 + len(following)


def sentinel(index: int) -> str:
    return _SENTINEL.format(index)


def user(index: int) -> Message:
    return {"role": "user", "content": sentinel(index)}


def blank(roles: tuple[str, ...]) -> list[Message]:
    """Messages of these roles, each holding the sentinel of its place."""
    return [{"role": role, "content": sentinel(index)} for index, role in enumerate(roles)]


def content_of(message: Message) -> str:
    content = message.get("content")
    if not isinstance(content, str):
        raise DataError(f"chat: the content of a {message.get('role')!r} message must be a string")
    return content

r"""The paper's own format over any chat template: a whole answer is one assistant message, in which the model writes
its programs between ``<code>`` tags, the environment what they print between ``<interpreter>`` tags, and the model the
final answer between ``<answer>`` tags (ReTool, arXiv 2504.11536, section 2).

The tags are plain text, so any tokenizer will do and the template need not know of tools. What a program prints can
spell them too; it can open or end no message, and only what the model itself wrote last is graded.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from retool.errors import DataError
from retool.formats import tags
from retool.formats.chat import ChatFormat, content_of, turns_of
from retool.formats.encoding import Span, TokenMatcher
from retool.types import Message, TokenOutput, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Every token of this stands in every prompt: keep it short.
INSTRUCTIONS = r"""You can run Python. Write
<code>
```python
...
```
</code>
and read what it prints between <interpreter> and </interpreter>. End with
<answer>
\boxed{...}
</answer>"""
QUESTION = "{query}"
"""Where the question goes in a prompt of the user's own."""


class CodeTagsFormat(ChatFormat):
    """``protocols.ToolFormat`` with the paper's tags.

    Args:
        prompt: not empty: the whole prompt where the tool is shown, the question in the place of ``{query}``, instead
            of the chat's own messages with ``INSTRUCTIONS``.

    Raises:
        ConfigError: the tokenizer has no chat template, or the template cannot carry a format.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, prompt: str = "") -> None:
        super().__init__(tokenizer)
        self.prompt = prompt
        ordinary = {i for i, token in self._encoder.added.items() if not token.special}
        self._turn_tokens = TokenMatcher(tokenizer, ordinary - set(self.stop_token_ids))

    @property
    def stop(self) -> tuple[str, ...]:
        return (tags.CODE_CLOSE,)

    def find_calls(self, text: str) -> list[ToolCall]:
        """The programs in one turn's decoded text, in order; malformed ones carry an error."""
        return tags.find_calls(text)

    def is_over(self, text: str) -> bool:
        return not tags.is_open(text)

    def observation_ids(self, results: list[str], output: TokenOutput) -> list[int]:
        """The tokens to append after ``output``: an ``<interpreter>`` block per result, inside the same message; where
        the model had ended the message (a program without ``</code>``), as a message of the user.

        Raises:
            ValueError: there is no result.
        """
        if not results:
            raise ValueError("results: an observation answers at least one call")
        last = output.token_ids[-1] if output.token_ids else None
        if last not in self.stop_token_ids:
            return self._output_ids(results)
        blocks = tags.BETWEEN.join(tags.write_output(text) for text in results)
        ended = [] if last == self.end_id else [self.end_id]
        return ended + self._environment_ids([{"role": "user", "content": blocks}])

    def _show_tool(self, head: list[Message]) -> list[Message]:
        if self.prompt:
            question = next((content_of(m) for m in reversed(head) if m.get("role") == "user"), "")
            return [{"role": "user", "content": self.prompt.replace(QUESTION, question)}]
        first, *others = head
        # A system message ends with what the model may do; without one, the template's own stays as it is.
        parts = [content_of(first), INSTRUCTIONS]
        ordered = parts if first.get("role") == "system" else parts[::-1]
        return [{**first, "content": "\n\n".join(ordered)}, *others]

    def _output_ids(self, results: list[str]) -> list[int]:
        text = "".join(tags.BETWEEN + tags.write_output(result) for result in results) + tags.BETWEEN
        return self._encoder.encode([Span(text)])

    def _pieces(self, messages: list[Message]) -> Iterator[tuple[list[int], int]]:
        for message, following in turns_of(messages):
            results = [content_of(m) for m in itertools.takewhile(lambda m: m.get("role") == "tool", following)]
            rest = following[len(results) :]
            for text, output in _turns(message, results):
                yield self._encoder.encode([Span(text, self._turn_tokens)]), 1
                if output is not None:
                    yield self._output_ids([output]), 0
            if rest and results:
                raise DataError("chat: a user message stands where the assistant's own message is not over")
            if rest or not following:
                yield [self.end_id], 1
            if rest:
                yield self._environment_ids(rest), 0


def _turns(message: Message, results: list[str]) -> list[tuple[str, str | None]]:
    """An assistant message as turns with one program each, and what it printed; the last one may have none.

    Raises:
        DataError: the message has not as many calls as there are results, or its own text breaks the grammar.
    """
    text, codes = str(message.get("content") or ""), _codes_of(message)
    if len(results) != len(codes):
        raise DataError(f"chat: {len(codes)} calls and {len(results)} tool messages; give one for each")
    if not codes:
        try:
            return tags.split_turns(text)
        except tags.TagError as error:
            raise DataError(f"chat: in an assistant message: {error}; mend its tags, or leave the row out") from None
    texts = [text, *[""] * (len(codes) - 1)]
    return [(tags.join(t, tags.write_code(code)), r) for t, code, r in zip(texts, codes, results, strict=True)]


def _codes_of(message: Message) -> list[str]:
    codes = []
    for call in message.get("tool_calls") or ():
        arguments = call.get("function", call)["arguments"]
        # Chat APIs carry arguments as a JSON string.
        codes.append(str((json.loads(arguments) if isinstance(arguments, str) else arguments)["code"]))
    return codes

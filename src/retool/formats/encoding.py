"""Text to ids, with control tokens only where they are meant.

A template's text may hold control tokens (``<|im_end|>``); a user's or a program's text may not, even where it spells
one out. So a rendering is kept as spans, each with the added tokens that it is trusted to hold. Text between two added
tokens is encoded in one go, whatever spans it came from: where no content spells a token, the ids are those of encoding
the whole rendering at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from retool.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerFast


class TokenMatcher:
    """Finds a chosen set of added tokens in text, the longest first."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, ids: Iterable[int]) -> None:
        known = tokenizer.added_tokens_decoder
        chosen = sorted((known[i].content, i) for i in ids)
        self.ids = dict(chosen)
        patterns = []
        for content, i in sorted(chosen, key=lambda item: -len(item[0])):
            # lstrip and rstrip tokens swallow the white space beside them (as Phi's do).
            left, right = (r"\s*" if known[i].lstrip else ""), (r"\s*" if known[i].rstrip else "")
            patterns.append(f"{left}(?:{re.escape(content)}){right}")
        self._pattern = re.compile("|".join(patterns)) if patterns else None

    def split(self, text: str) -> list[str | int]:
        """``text`` as plain strings and the ids of the tokens found between them."""
        parts: list[str | int] = []
        position = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            parts.append(text[position : match.start()])
            found = match.group()
            parts.append(self.ids[found] if found in self.ids else self.ids[found.strip()])
            position = match.end()
        parts.append(text[position:])
        return parts


class Span(NamedTuple):
    """A piece of a rendering, with the added tokens that it may hold; None: plain text, whatever it spells."""

    text: str
    tokens: TokenMatcher | None = None


class Encoder:
    """Encodes spans with one tokenizer.

    Raises:
        ConfigError: the tokenizer's model itself turns a special token's spelling into the token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        from tokenizers import Tokenizer

        self.tokenizer = tokenizer
        self.added = tokenizer.added_tokens_decoder
        self.all_tokens = TokenMatcher(tokenizer, self.added)
        # The same model without its added tokens cannot produce a control token from text.
        backend = tokenizer.backend_tokenizer
        self._plain = Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        for token_id, token in self.added.items():
            if token.special and token_id in self.plain(token.content).ids:
                raise ConfigError(
                    f"tokenizer: plain text that spells {token.content!r} cannot be told from the token itself; "
                    "use a tokenizer whose model does not hold its special tokens"
                )

    def plain(self, text: str) -> Encoding:
        """``text`` without any added token, whatever it spells."""
        return self._plain.encode(text, add_special_tokens=False)

    def encode(self, spans: Sequence[Span]) -> list[int]:
        """The ids of the spans' text, one after the other."""
        ids: list[int] = []
        run = ""
        for span in spans:
            for part in span.tokens.split(span.text) if span.tokens else (span.text,):
                if isinstance(part, str):
                    run += part
                    continue
                ids += self.plain(run).ids if run else []
                ids.append(part)
                run = ""
        return ids + (self.plain(run).ids if run else [])

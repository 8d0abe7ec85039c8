"""How chats, tool calls and tool answers look as tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from retool.config import RolloutConfig
from retool.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from retool.formats.chat import ChatFormat


def make_format(config: RolloutConfig, tokenizer: PreTrainedTokenizerFast) -> ChatFormat:
    """The recipe's format over a tokenizer.

    Raises:
        ConfigError: the tokenizer cannot carry it, or ``rollout.prompt_file`` cannot be read or has no ``{query}``.
    """
    if config.format == "hermes":
        from retool.formats.hermes import HermesFormat

        return HermesFormat(tokenizer)
    from retool.formats.code_tags import QUESTION, CodeTagsFormat

    prompt = ""
    if config.prompt_file:
        try:
            prompt = Path(config.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"rollout.prompt_file = {config.prompt_file!r}: {error}; give a text file") from None
        if QUESTION not in prompt:
            raise ConfigError(
                f"rollout.prompt_file = {config.prompt_file!r}: no {QUESTION}; put it where the question goes"
            )
    return CodeTagsFormat(tokenizer, prompt)

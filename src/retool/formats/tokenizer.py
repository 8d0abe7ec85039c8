"""Loading a tokenizer: the only place that asks transformers for one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from retool.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# transformers makes an empty tokenizer, without a word, of a folder that has a config and no vocabulary.
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",), ("vocab.txt",))
_MEND = "give a folder with tokenizer.json, or with vocab.json, merges.txt and tokenizer_config.json, or a hub name"


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerFast:
    """A fast tokenizer from a folder in Hugging Face layout, or from a hub name.

    ``vocab.json`` + ``merges.txt`` + ``tokenizer_config.json`` are enough: added tokens and the chat template then come
    from the config. A folder is never looked up on the hub.

    Raises:
        ConfigError: there is no such folder or hub name, it holds no tokenizer, or only a slow one.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(path)
    if folder.is_file():
        raise ConfigError(f"tokenizer {str(path)!r} is a file: give the folder that holds tokenizer_config.json")
    if folder.is_dir() and not any(all((folder / name).is_file() for name in names) for names in _VOCABULARIES):
        raise ConfigError(f"tokenizer {str(path)!r} has no vocabulary: {_MEND}")
    try:
        # A folder that is missing a file must fail here, not be searched for on the hub under its own path.
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=folder.is_dir())
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"tokenizer {str(path)!r} cannot be loaded ({first_line}): {_MEND}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"tokenizer {str(path)!r} has no fast version: convert it to tokenizer.json")
    return tokenizer

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from fakes import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

import retool.nano
from retool.formats.code_tags import CodeTagsFormat
from retool.formats.hermes import HermesFormat
from retool.formats.tokenizer import load_tokenizer

# Unlike any template we ship: other control tokens, contents trimmed, earlier turns upper-cased, the tool's answers in
# a role of their own, a call's tags special, and an opening with a word of its own.
ODD_SPECIAL = ("[PAD]", "[OPEN]", "[TURN]", "<tool_call>", "</tool_call>", "[STOP]")
ODD_TEMPLATE = """\
{%- if tools %}[OPEN]tools {{ tools | tojson }}[STOP]{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}[OPEN]result: {{ message.content | trim }}[STOP]
{%- elif message.role == 'assistant' and not loop.last %}[OPEN]assistant says {{ message.content | upper }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}[STOP]
{%- elif message.role == 'assistant' %}[OPEN]assistant says {{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}[STOP]
{%- else %}[OPEN]{{ message.role }} says {{ message.content | trim }}[STOP]{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}[OPEN]assistant says {% endif %}"""


@cache
def tokenizer_of(name: str, shared_data: Path | None) -> PreTrainedTokenizerFast:
    """Kept: reading Qwen's vocabulary takes a second."""
    if name == "nano":
        tokenizer = load_tokenizer(Path(retool.nano.__file__).parent)
    elif name == "tiny":
        tokenizer = tiny_tokenizer()
    elif name == "odd":
        tokenizer = tiny_tokenizer(ODD_TEMPLATE, ODD_SPECIAL)
    else:
        assert shared_data is not None
        tokenizer = load_tokenizer(shared_data / "tokenizer" / "qwen2.5")
        template = shared_data / "tokenizer" / name / "chat_template.jinja"
        tokenizer.chat_template = template.read_text(encoding="utf-8")
        if name == "qwen3":
            # As Qwen3's own tokenizer has them, where Qwen2.5 spells them out.
            tokenizer.add_tokens(["<tool_response>", "</tool_response>", "<think>", "</think>"])
    return tokenizer


@cache
def make(name: str, shared_data: Path | None) -> HermesFormat:
    return HermesFormat(tokenizer_of(name, shared_data))


@cache
def make_tags(name: str, shared_data: Path | None) -> CodeTagsFormat:
    return CodeTagsFormat(tokenizer_of(name, shared_data))


@pytest.fixture(params=["nano", "tiny", "odd", "qwen2.5", "qwen3"])
def tokenizer_name(request: pytest.FixtureRequest) -> tuple[str, Path | None]:
    """A tokenizer's name, and the folder of data that it needs."""
    needs_data = request.param.startswith("qwen")
    return request.param, request.getfixturevalue("shared_data") if needs_data else None


@pytest.fixture
def fmt(tokenizer_name: tuple[str, Path | None]) -> HermesFormat:
    return make(*tokenizer_name)


@pytest.fixture
def tiny() -> HermesFormat:
    return make("tiny", None)


@pytest.fixture
def qwen(shared_data: Path) -> HermesFormat:
    return make("qwen2.5", shared_data)

"""The honesty of the quickstart: nothing that is evaluated occurs in the text on which nano was pre-trained."""

import contextlib
import io
import re
from itertools import islice

import pytest

from retool.data.corpus import SKILLS, documents
from retool.data.world import FAMILIES
from retool.formats.hermes import HermesFormat
from retool.nano.pretrain import encode, train_tokenizer
from retool.types import Conversation

SAMPLE = 6000


def as_pattern(template: str) -> re.Pattern[str]:
    """A question's or program's template with any numbers in its places."""
    pieces = re.split(r"\{\d\}", template)
    return re.compile(r"\d+".join(re.escape(piece) for piece in pieces))


QUESTIONS = {f"{f.name}: {q}": as_pattern(q) for f in FAMILIES for q in f.questions}
PROGRAMS = {f.name: as_pattern(f.program) for f in FAMILIES}


@pytest.fixture(scope="module")
def sample() -> list[Conversation | str]:
    return list(islice(documents(0), SAMPLE))


def text_of(document: Conversation | str) -> str:
    if isinstance(document, str):
        return document
    return "\n".join(m["content"] + "\n" + "\n".join(codes(m)) for m in document.messages)


def codes(message: dict) -> list[str]:  # type: ignore[type-arg]
    return [call["function"]["arguments"]["code"] for call in message.get("tool_calls", [])]


def test_the_patterns_find_what_they_look_for() -> None:
    assert QUESTIONS["add: What is {0} + {1}?"].search("What is 12 + 345?")
    assert PROGRAMS["mod_power"].search("print(pow(3, 45, 6))")


def test_no_evaluated_question_and_no_evaluated_program_occurs(sample: list[Conversation | str]) -> None:
    text = "\n".join(map(text_of, sample))
    for name, pattern in {**QUESTIONS, **PROGRAMS}.items():
        assert not pattern.search(text), name


def test_no_program_that_is_run_computes_what_a_family_asks() -> None:
    """Programs whose outputs are seen use none of the operations that the families are about."""
    forbidden = (r" \* (?!\*)", r"pow\(", r"gcd|lcm", r"sum\(", r"all\(", r"%", r"\{0\} \+ \{1\}[^)]*\)$", r"len\(")
    for skill in SKILLS:
        program = skill.program.replace("10 ** 9", "LAST")
        for pattern in forbidden:
            assert not re.search(pattern, program), (skill.name, pattern)


def test_written_outputs_are_what_the_programs_print(sample: list[Conversation | str]) -> None:
    """The programs are ours, not a model's, so they may run here."""
    ran = 0
    for document in sample[:600]:
        if isinstance(document, str):
            continue
        for call, answer in zip(document.messages, document.messages[1:], strict=False):
            for code in codes(call):
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    exec(code, {})
                assert out.getvalue().rstrip("\n") == answer["content"], code
                ran += 1
    assert ran > 200


def test_documents_become_samples_whose_learnt_tokens_are_the_assistants() -> None:
    tokenizer = train_tokenizer(0)
    fmt = HermesFormat(tokenizer)
    for document in islice(documents(1), 200):
        sample = encode(document, fmt, tokenizer)
        learnt = fmt.decode([t for t, m in zip(sample.ids_T, sample.mask_T, strict=True) if m])
        if isinstance(document, str):
            assert document in learnt
        else:
            assistant = [m["content"] for m in document.messages if m["role"] == "assistant"]
            others = [m["content"] for m in document.messages if m["role"] != "assistant"]
            assert all(content in learnt for content in assistant)
            assert others[0] not in learnt

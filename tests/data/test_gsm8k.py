from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from retool.data.gsm8k import convert
from retool.data.prompts import SYSTEM_PROMPT
from retool.data.sets import load_problems
from retool.errors import DataError
from retool.grading.answers import extract_answer
from retool.grading.equivalence import equivalent
from retool.types import Conversation, Task

NATALIA = {
    "question": "Natalia sold clips to 48 of her friends in April, and half as many in May. How many altogether?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\nThat is 48+24 = <<48+24=72>>72 in all.\n#### 72",
}


def write(path: Path, *rows: dict[str, Any] | str) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def solved(question: str, solution: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": f"{solution}\n#### {answer}"}


def code_of(conversation: Conversation) -> str:
    code = conversation.messages[2]["tool_calls"][0]["function"]["arguments"]["code"]
    assert isinstance(code, str)
    return code


def load_tasks(path: Path, split: str) -> list[Task]:
    return [problem.task() for problem in load_problems("gsm8k", file=str(path), split=split)]


def convert_rows(path: Path) -> tuple[list[Conversation], Counter[str]]:
    return convert(load_problems("gsm8k", file=str(path)))


def load_conversations(path: Path) -> list[Conversation]:
    return convert_rows(path)[0]


def test_tasks(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl", NATALIA, "", solved("Cost?", "Much.", "1,234,567"), solved("Cold?", "Yes.", "-5.5")
    )
    tasks = load_tasks(path, "test")
    assert [(t.id, t.source, t.answer) for t in tasks] == [
        ("gsm8k/test/0", "gsm8k", "72"),
        ("gsm8k/test/1", "gsm8k", "1234567"),
        ("gsm8k/test/2", "gsm8k", "-5.5"),
    ]
    assert tasks[0].messages == [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": NATALIA["question"]},
    ]


def test_a_solution_becomes_a_program_that_uses_its_own_results(tmp_path: Path) -> None:
    (conversation,) = load_conversations(write(tmp_path / "a.jsonl", NATALIA))
    assert [m["role"] for m in conversation.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert code_of(conversation) == "s1 = 48/2\nprint(s1)\ns2 = 48+s1\nprint(s2)"
    assert conversation.messages[3]["content"] == "24.0\n72.0"
    assert conversation.messages[4]["content"] == (
        "She sold 48/2 = 24 clips in May.\nThat is 48+24 = 72 in all.\n\\boxed{72}"
    )
    assert conversation.tools


def test_a_number_that_the_question_gives_is_not_taken_for_a_result(tmp_path: Path) -> None:
    row = solved("He has 1,000 and 10 and 100.", "<<10*100=1000>>1000 <<1000+100=1100>>1100", "1100")
    (conversation,) = load_conversations(write(tmp_path / "a.jsonl", row))
    assert code_of(conversation).splitlines()[2] == "s2 = 1000+100"


@pytest.mark.parametrize(
    ("solution", "answer", "reason"),
    [
        ("Easy.", "5", "without an annotated calculation"),
        ("<<10/3=4>>4", "4", "whose result differs from its annotation"),
        ("<<10/3=3>>3", "3", "whose result differs from its annotation"),
        ("<<10/3=3.3>>3.3 <<3.3*3=9.9>>9.9", "9.9", "whose last result is not the answer"),
        ("<<2+2=4>>4", "5", "whose last result is not the answer"),
        ("<<2+2=four>>4", "4", "whose result is not a number"),
        ("<<2+=4>>4", "4", "whose calculation is not plain arithmetic"),
        ("<<1/0=4>>4", "4", "whose calculation is not plain arithmetic"),
        ("<<x*2=4>>4", "4", "whose calculation is not plain arithmetic"),
        ("<<exit()=4>>4", "4", "whose calculation is not plain arithmetic"),
        ("<<9**9**9**9=4>>4", "4", "with an enormous power"),
        ("<<2+2>>4 <<4=4>>4", "4", "with an annotation that is no calculation"),
    ],
)
def test_a_row_that_does_not_fit_is_counted_with_its_reason(
    tmp_path: Path, solution: str, answer: str, reason: str
) -> None:
    path = write(tmp_path / "a.jsonl", solved("How many?", solution, answer), NATALIA)
    conversations, unfit = convert_rows(path)
    assert [c.id for c in conversations] == ["gsm8k/train/1"]
    if solution.startswith("<<10/3=3.3>>"):
        # The second step takes the unrounded result: 10, which is not what the annotation says.
        reason = "whose result differs from its annotation"
    assert dict(unfit) == {reason: 1}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "?", "answer": "5 ####"}, "'' after '####' is not a number"),
        ({"question": "?", "answer": "#### five"}, "'five' after '####' is not a number"),
    ],
)
def test_a_broken_row_is_one_line_with_file_and_row(tmp_path: Path, row: Any, says: str) -> None:
    path = write(tmp_path / "a.jsonl", NATALIA, "", row)
    with pytest.raises(DataError, match=says) as caught:
        load_tasks(path, "test")
    assert str(caught.value).startswith(f"{path}, row 1: ")
    assert "\n" not in str(caught.value)


def test_real_tasks(shared_data: Path) -> None:
    assert len(load_tasks(shared_data / "math" / "gsm8k_test.jsonl", "test")) == 1319
    train = load_tasks(shared_data / "math" / "gsm8k_train.jsonl", "train")
    assert len(train) == len({t.id for t in train}) == 7473
    assert train[0].answer == "72"
    assert all("," not in t.answer for t in train)


def test_real_solutions_print_what_their_conversations_say(shared_data: Path) -> None:
    """Against Python itself: the recorded outputs are our own arithmetic's."""
    path = shared_data / "math" / "gsm8k_test.jsonl"
    conversations, unfit = convert_rows(path)
    assert len(conversations) + unfit.total() == 1319
    assert len(conversations) > 1150
    answers = {t.id.rpartition("/")[2]: t.answer for t in load_tasks(path, "test")}
    programs = []
    for conversation in conversations:
        programs.append(f"{code_of(conversation)}\nprint('--')")
        final = conversation.messages[4]["content"]
        assert "<<" not in final
        assert equivalent(extract_answer(final), answers[conversation.id.rpartition("/")[2]])
    ran = subprocess.run(
        [sys.executable, "-I", "-"], input="\n".join(programs), capture_output=True, text=True, check=True
    )
    assert ran.stdout.split("--\n")[:-1] == [c.messages[3]["content"] + "\n" for c in conversations]

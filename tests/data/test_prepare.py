"""Cleaning, decontamination and the report."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retool.data.cleaning import is_chinese, normalise, strip_wrapper
from retool.data.decontaminate import COMMON, Index, words
from retool.data.prepare import Cleaning, Report, clean, prepare
from retool.data.problem import Problem
from retool.data.sets import load_problems
from retool.errors import DataError

WRAPPED = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\nRemember to put your answer on "
    'its own line after "Answer:".'
)


def problem(question: str, answer: str = "1", number: int = 0) -> Problem:
    return Problem(f"s/{number}", "s", question, answer)


def cleaned(*rows: tuple[str, str], **wanted: Any) -> tuple[list[str], Report]:
    report = Report("s")
    problems = [problem(question, answer, number) for number, (question, answer) in enumerate(rows)]
    return [p.id for p in clean(problems, Cleaning(**wanted), report)], report


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("Find $x$.", "find \\(x\\) ."),
        (r"\dfrac{1}{2}", r"\frac12".replace("12", "{1}{2}")),
        ("x^{2}", "x^2"),
        (r"\left( 1,\, 2 \right)", "(1, 2)"),
        ("ﬁnd  x\n", "find x"),
        ("１２", "12"),
    ],
)
def test_copies_are_the_same(ours: str, theirs: str) -> None:
    assert normalise(ours) == normalise(theirs)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("x + 1", "x - 1"),
        ("x = 12", "x = 1.2"),
        ("x^{12}", "x^{1}2"),
        ("Find x.", "Find y."),
        ("a < b", "a > b"),
        (r"\leq", r"\geq"),
        (r"\lefteqn", r"eqn"),
        ("3, 4", "34"),
        ("步", "骤"),
    ],
)
def test_different_problems_are_not(ours: str, theirs: str) -> None:
    assert normalise(ours) != normalise(theirs)


@settings(max_examples=200, deadline=None)
@given(st.text().filter(lambda text: "Remember" not in text))
def test_a_wrapper_is_taken_off(question: str) -> None:
    assert strip_wrapper(WRAPPED.format(question)) == question.strip()
    assert strip_wrapper(question) == question.strip()


def test_a_question_that_only_looks_like_one_stays() -> None:
    text = "Solve the following math problem step by step. What is 2+2?"
    assert strip_wrapper(text) == text


def test_duplicates_keep_their_first_row_and_conflicts_none() -> None:
    kept, report = cleaned(
        ("What is $x$?", "1"), ("what is x?", "1.0"), ("What is y?", "2"), ("What is y?", "3"), ("What is y?", "2"),
        ("", "4"), ("Empty?", ""), ("What is z?", "5"),
    )  # fmt: skip
    assert kept == ["s/0", "s/7"]
    assert dict(report.dropped) == {"duplicate": 1, "conflicting answers": 3, "no question": 1, "no answer": 1}
    assert report.read == 8 == report.kept + report.dropped.total()
    assert report.notes["rows equal to an earlier one to the byte"] == 2
    assert report.notes["questions equal to the byte with different answers"] == 1
    (conflict,) = (row for row in report.rows if row["reason"] == "conflicting answers")
    assert conflict["answers"] == ["2", "3"] and conflict["rows"] == 3 and conflict["id"] == "s/2"


def test_duplicates_can_be_kept() -> None:
    kept, report = cleaned(("A?", "1"), ("A?", "2"), duplicates=True)
    assert kept == ["s/0", "s/1"]
    assert not report.dropped


def test_chinese_is_a_switch() -> None:
    rows = [("求 $x$ 的值", "1"), ("Find x.", "2")]
    assert cleaned(*rows)[0] == ["s/0", "s/1"]
    kept, report = cleaned(*rows, chinese=False)
    assert kept == ["s/1"] and dict(report.dropped) == {"Chinese": 1}
    assert is_chinese("日本") and not is_chinese("α é か")


SENTENCE = "Mira walks around the lake twice each morning and counts thirteen herons standing on the western pier"


def test_an_overlap_is_found_and_explained(tmp_path: Path) -> None:
    path = tmp_path / "eval.jsonl"
    path.write_text(json.dumps({"question": f"{SENTENCE}. How many in 3 days?", "answer": "78"}) + "\n"
                    + json.dumps({"question": "What is $2+2$?", "answer": "4"}) + "\n")  # fmt: skip
    kept, report = cleaned(
        (f"Each day {SENTENCE.lower()}! How many in a week?", "1"),
        ("What is 2 + 2 ?", "4"),
        ("What is 2 + 3?", "5"),
        (" ".join(SENTENCE.split()[:12]) + " birds", "6"),
        against=[str(path)],
    )
    assert kept == ["s/2", "s/3"]
    ngram, exact = report.rows
    assert (ngram["id"], ngram["kind"], ngram["evaluation"]) == ("s/0", "ngram", "eval/0")
    assert ngram["shared"] == " ".join(SENTENCE.lower().split()[:13])
    assert 0 < ngram["share"] < 1
    assert (exact["id"], exact["kind"], exact["evaluation"], exact["share"]) == ("s/1", "exact", "eval/1", 1.0)
    assert cleaned((SENTENCE, "1"), against=[str(path)], share=0.9)[0] == ["s/0"]
    assert cleaned((SENTENCE, "1"), against=[str(path)], ngram=30)[0] == ["s/0"]


def test_a_turn_of_phrase_is_no_overlap() -> None:
    phrase = "where m and n are relatively prime positive integers find the value of m plus n"
    index = Index([problem(f"{SENTENCE} and the share of them that fly is m over n {phrase}")])
    others = [f"Problem {n} about {n * n} {phrase}" for n in range(COMMON + 1)]
    assert index.match(others[0]) is not None
    index.learn_phrases(others)
    assert index.match(others[0]) is None
    assert index.match(f"{SENTENCE} {phrase}") is not None


def test_words_of_chinese_and_of_latex() -> None:
    assert words("求 $x_1+2$的值 is 3x, (a)b") == ["求", "x12", "的", "值", "is", "3x", "ab"]
    text = "小明每天早上绕湖走两圈并数西边码头上的鹭"
    index = Index([problem(text + "。三天共多少只？")])
    assert index.match("假设" + text + "。问一周？") is not None


@pytest.fixture
def dapo(shared_data: Path, tmp_path: Path) -> tuple[Report, Path]:
    out = tmp_path / "dapo.parquet"
    against = [f"math-500={shared_data / 'math' / 'math500.jsonl'}"]
    file = str(shared_data / "dapo" / "dapo_math_17k.parquet")
    return prepare("dapo-math-17k", out, file=file, wanted=Cleaning(against=against)), out


def test_the_real_dapo_file(dapo: tuple[Report, Path], shared_data: Path) -> None:
    """Its own counts (MANIFEST.md) are of rows that are equal to the byte; ours are of normalised text, and find more.
    Eleven rows hold at least four fifths of a MATH-500 problem."""
    report, out = dapo
    assert report.read == 17_917
    assert report.notes["rows with Chinese"] == 3432
    assert report.notes["rows equal to an earlier one to the byte"] == 627
    assert report.notes["questions equal to the byte with different answers"] == 11
    assert report.notes["contaminated rows, copies included, that share at least 80%"] == 11
    assert report.dropped == {"duplicate": 1374, "conflicting answers": 44, "contaminated": 42}
    assert report.kept + report.dropped.total() == report.read
    kept = list(load_problems(str(out)))
    assert len(kept) == report.kept == 16_457
    first = {p.id: p for p in load_problems("dapo-math-17k", file=str(shared_data / "dapo" / "dapo_math_17k.parquet"))}
    for found in kept:
        original = first[found.id]
        assert (found.question, found.answer) == (original.question.strip(), original.answer)
        assert (found.index, found.source) == (original.index, "dapo-math-17k")
    listed = [json.loads(line) for line in out.with_name("dapo.dropped.jsonl").read_text().splitlines()]
    assert sum(row.get("rows", 1) for row in listed) == report.dropped.total()
    assert json.loads(out.with_name("dapo.report.json").read_text())["kept"] == report.kept


def test_the_file_is_verls_layout(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"question": " A? ", "answer": "1", "solution": "S"}) + "\n")
    prepare(str(source), tmp_path / "out" / "a.parquet")
    (row,) = pq.read_table(tmp_path / "out" / "a.parquet").to_pylist()
    assert row == {
        "data_source": "a",
        "prompt": [{"role": "user", "content": "A?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "1"},
        "extra_info": {"index": None, "split": "train", "id": "a/0", "solution": "S"},
    }
    (problem,) = load_problems(str(tmp_path / "out" / "a.parquet"))
    assert problem == Problem("a/0", "a", "A?", "1", "S")


@pytest.mark.parametrize(
    ("out", "says"),
    [("a.jsonl", "ends in .parquet"), ("a.parquet", "is the input itself"), ("folder.parquet", "is a folder")],
)
def test_a_wrong_output_is_one_line_before_anything_is_read(tmp_path: Path, out: str, says: str) -> None:
    (tmp_path / "folder.parquet").mkdir()
    source = tmp_path / "a.parquet"
    source.write_bytes(b"not read")
    with pytest.raises(DataError, match=says) as caught:
        prepare(str(source), tmp_path / out)
    assert "\n" not in str(caught.value)


def test_nothing_is_written_where_nothing_is_left_or_a_row_is_broken(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    for text, says in (('{"question": "A?", "answer": ""}\n', "none of 1 rows is left"),
                       ('{"question": "A?", "answer": "1"}\n{', "line 2: not JSON")):  # fmt: skip
        source.write_text(text)
        with pytest.raises(DataError, match=says):
            prepare(str(source), tmp_path / "out.parquet")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl"]


def test_a_limit_is_counted(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"question": f"{n}?", "answer": "1"}) + "\n" for n in range(9)))
    report = prepare(str(source), tmp_path / "out.parquet", limit=4)
    assert (report.kept, dict(report.dropped)) == (4, {"over --limit": 5})


def test_copies_take_no_memory() -> None:
    """As the published DAPO-Math-17k: each problem a hundred times, in random order, with the wrapper."""
    rng = random.Random(0)
    questions = [WRAPPED.format(f"Problem {n}: {rng.random()} " + "x " * 200) for n in range(200)]

    def repeated(times: int) -> Iterator[Problem]:
        for number in range(200 * times):
            yield problem(questions[number % 200], str(number % 200), number)

    peaks = []
    for times in (2, 40):
        tracemalloc.start()
        report = Report("s")
        assert len(clean(repeated(times), Cleaning(), report)) == 200
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert report.notes["rows with a wrapper around the question"] == 200 * times
    assert peaks[1] < 1.3 * peaks[0]


def write_lines(path: Path, *found: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(path)


def test_what_was_dropped_names_its_row(tmp_path: Path) -> None:
    """Rows may have ids of their own, which say nothing of their place."""
    pairs = [("", "1"), ("A?", "1"), ("B?", ""), ("a?", "1"), ("C?", "1"), ("C?", "2")]
    rows = [{"question": q, "answer": a, "id": f"x{n}"} for n, (q, a) in enumerate(pairs)]
    report = prepare(write_lines(tmp_path / "a.jsonl", *rows), tmp_path / "o.parquet")
    assert [(r["id"], r["row"], r["reason"]) for r in report.rows] == [
        ("x0", 0, "no question"), ("x2", 2, "no answer"), ("x1", 1, "duplicate"), ("x4", 4, "conflicting answers"),
    ]  # fmt: skip


def test_half_a_character_drops_its_row(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"question": "A \\ud800?", "answer": "1"}\n{"question": "B?", "answer": "2"}\n')
    report = prepare(str(source), tmp_path / "o.parquet")
    assert (report.kept, dict(report.dropped)) == (1, {"broken Unicode": 1})
    (listed,) = map(json.loads, (tmp_path / "o.dropped.jsonl").read_text().splitlines())
    assert (listed["id"], listed["row"]) == ("a/0", 0)


@pytest.mark.parametrize("index", [2**63 - 1, -(2**63) + 1, 2**63, 10**30])
def test_any_index_is_kept(index: int, tmp_path: Path) -> None:
    row = {"question": "A?", "answer": "1", "extra_info": {"index": index}}
    prepare(write_lines(tmp_path / "a.jsonl", row), tmp_path / "o.parquet")
    (found,) = load_problems(str(tmp_path / "o.parquet"))
    assert found.index == (index if abs(index) < 2**63 else str(index))


def test_the_split_that_is_written_is_the_one_that_was_read(tmp_path: Path) -> None:
    for name, split, expected in (("math-500", "", "test"), ("aime-2025", "", "train"), ("gsm8k", "test", "test")):
        source = write_lines(tmp_path / "a.jsonl", {"problem": "A?", "question": "A?", "answer": "#### 1"})
        prepare(name, tmp_path / "o.parquet", file=source, split=split)
        (row,) = pq.read_table(tmp_path / "o.parquet").to_pylist()
        assert row["extra_info"]["split"] == expected


def test_an_evaluation_is_of_the_test_split(tmp_path: Path) -> None:
    """Else training on gsm8k against gsm8k would leave nothing, and its test set would be learnt from."""
    hub = tmp_path / "hub"
    hub.mkdir()
    for split in ("train", "test"):
        pq.write_table(
            pa.table({"question": [f"What of the {split}?"], "answer": ["#### 1"]}), hub / f"{split}.parquet"
        )
    source = write_lines(
        tmp_path / "a.jsonl", *({"question": f"What of the {s}?", "answer": "1"} for s in ("train", "test"))
    )
    report = prepare(source, tmp_path / "o.parquet", wanted=Cleaning(against=[f"gsm8k={hub}"]))
    assert [(row["id"], row["evaluation"]) for row in report.rows] == [("a/1", "gsm8k/test/0")]


@pytest.mark.parametrize(
    "read", ["eval.parquet", "eval.report.json", "eval.dropped.jsonl", "against", "a folder with it"]
)
def test_what_is_read_is_not_written_over(read: str, tmp_path: Path) -> None:
    rows = [{"question": "A?", "answer": "1"}, {"question": "A?", "answer": "1"}]
    source = write_lines(tmp_path / "a.jsonl", *rows)
    out = tmp_path / "in" / "eval.parquet"
    prepare(source, out)
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    if read == "against":
        spec, wanted = source, Cleaning(against=[str(out)])
    else:
        spec, wanted = str(out.parent if read == "a folder with it" else out.with_name(read)), Cleaning()
    with pytest.raises(DataError, match="is the input itself; give another name") as caught:
        prepare(spec, out, wanted=wanted)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", {"question": "A?", "answer": "1"})
    with pytest.raises(DataError, match=r"x\.parquet: cannot be written \(.*\); give another place") as caught:
        prepare(source, Path("/proc/x.parquet"))
    assert "\n" not in str(caught.value)

"""The sets that are known by name, any file, and the hub: the same rows are the same problems."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retool.data.problem import Problem
from retool.data.reading import hub_rows, rows
from retool.data.sets import SETS, load_problems, set_rows, split_spec
from retool.errors import ConfigError, DataError

DAPO = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "What is 6*7?"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "42", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079"},
}
# The columns of the published sets, with rows of our own.
PUBLISHED: dict[str, tuple[list[dict[str, Any]], list[tuple[str, str]]]] = {
    "dapo-math-17k": ([DAPO, DAPO | {"extra_info": {"index": "another"}}], [("What is 6*7?", "42")] * 2),
    "aime-2024": (
        [{"ID": "2024-I-1", "Problem": "Find $x$.", "Solution": "Look.", "Answer": 33}],
        [("Find $x$.", "33")],
    ),
    "aime-2025": (
        [{"id": 0, "problem": "Find $y$.", "answer": "070", "solution": "See.", "url": "u", "year": 2025}],
        [("Find $y$.", "070")],
    ),
    "math-500": (
        [
            {
                "problem": "A?",
                "solution": "B.",
                "answer": r"\frac12",
                "subject": "Algebra",
                "level": 2,
                "unique_id": "t/1",
            }
        ],
        [("A?", r"\frac12")],
    ),
    "gsm8k": (
        [{"question": "How many?", "answer": "It is <<2*3=6>>6.\n#### 1,006"}],
        [("How many?", "1006")],
    ),
}


def write_lines(path: Path, found: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found), encoding="utf-8")
    return path


def write_parquet(path: Path, found: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(found), path)
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_hub_and_files_give_the_same_problems(name: str, tmp_path: Path) -> None:
    """The hub's path is ``datasets`` on a folder in the layout of the repository: what it downloads is such a one."""
    found, expected = PUBLISHED[name]
    split = next(iter(SETS[name].splits))
    hub = write_parquet(tmp_path / name / "data" / f"{SETS[name].splits[split]}-00000-of-00001.parquet", found).parents[
        1
    ]
    places = [hub, write_parquet(tmp_path / "a.parquet", found), write_lines(tmp_path / "a.jsonl", found)]
    loaded = [list(load_problems(name, file=str(place))) for place in places]
    assert loaded[0] == loaded[1] == loaded[2]
    assert [(p.question, p.answer) for p in loaded[0]] == expected
    assert loaded[0][0].source == name
    assert loaded[0][0].id == (f"gsm8k/train/{0}" if name == "gsm8k" else f"{name}/0")


def test_what_a_set_knows_besides(tmp_path: Path) -> None:
    (problem,) = load_problems("math-500", file=str(write_lines(tmp_path / "a.jsonl", PUBLISHED["math-500"][0])))
    assert problem.meta == {"subject": "Algebra", "level": 2, "unique_id": "t/1"}
    assert problem.solution == "B."
    (problem,) = load_problems(
        "gsm8k", file=str(write_lines(tmp_path / "b.jsonl", PUBLISHED["gsm8k"][0])), split="test"
    )
    assert (problem.id, problem.solution) == ("gsm8k/test/0", "It is <<2*3=6>>6.")
    dapo = [DAPO, DAPO | {"extra_info": {"index": 17}}, DAPO | {"extra_info": None}]
    found = load_problems("dapo-math-17k", file=str(write_lines(tmp_path / "c.jsonl", dapo)))
    assert [p.index for p in found] == ["9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079", 17, None]


def test_the_real_files(shared_data: Path) -> None:
    def load(name: str, path: str) -> list[Problem]:
        return list(load_problems(name, file=str(shared_data / path)))

    aime = load("aime-2025", "aime/aime_2025.jsonl")
    assert len(aime) == len(load("aime-2024", "aime/aime_2024.jsonl")) == 30
    assert all(p.answer.isdigit() for p in aime)
    assert len(load("math-500", "math/math500.jsonl")) == 500
    assert len(load("dapo-math-17k", "dapo/dapo_math_17k.parquet")) == 17_917


def test_ones_own_columns(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "mine.jsonl", [{"q": {"text": "What?"}, "truth": 34.0, "name": "first"}])
    columns = {"question": "q.text", "answer": "truth", "id": "name"}
    assert list(load_problems(str(path), columns=columns)) == [Problem("first", "mine", "What?", "34")]
    plain = write_lines(tmp_path / "plain.jsonl", [{"problem": "What?", "answer": 0.5}])
    assert list(load_problems(str(plain))) == [Problem("plain/0", "plain", "What?", "0.5")]
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    other = write_parquet(tmp_path / "chat.parquet", [{"prompt": chat, "answer": "1"}])
    assert next(load_problems(str(other))).question == "u"


@pytest.mark.parametrize(
    ("columns", "row", "says"),
    [
        ({"question": "nope"}, {"question": "?", "answer": "1"}, "column 'nope' is not there; it has question, answer"),
        ({"topic": "t"}, {"question": "?", "answer": "1"}, "column 'topic': there is no such field"),
        ({}, {"text": "?", "answer": "1"}, "a column for 'question' is not there; it has text, answer"),
        ({}, {"question": 5, "answer": "1"}, "row 0: the question is no text"),
        ({}, {"question": "?", "answer": ["1"]}, "row 0: 'answer' is a list"),
        ({}, {"question": "?", "answer": True}, "row 0: 'answer' is a bool"),
        (
            {"question": "prompt"},
            {"prompt": [{"role": "system", "content": "?"}], "answer": "1"},
            "no chat with a user",
        ),
    ],
)
def test_a_wrong_column_is_one_line(columns: dict[str, str], row: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [row])
    with pytest.raises((ConfigError, DataError), match=says) as caught:
        list(load_problems(str(path), columns=columns))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nonsense", "unknown; give one of retool-sft, dapo-math-17k"),
        ("missing.parquet", "no such file"),
        ("retool-sft", "holds conversations"),
    ],
)
def test_a_wrong_name_is_one_line(spec: str, says: str) -> None:
    with pytest.raises((ConfigError, DataError), match=says):
        list(load_problems(spec))


def test_a_wrong_split_or_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="split = 'test': aime-2025 has train"):
        set_rows("aime-2025", split="test")
    with pytest.raises(DataError, match="no such file"):
        set_rows("aime-2025", file=str(tmp_path / "none.jsonl"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        list(hub_rows(str(tmp_path / "empty"), "train"))
    assert "\n" not in str(caught.value) and "local copy" in str(caught.value)


def test_a_spec_may_name_its_file() -> None:
    assert split_spec("aime-2025=/a/b=c.jsonl") == ("aime-2025", "/a/b=c.jsonl")
    assert split_spec("aime-2025") == ("aime-2025", "")


def test_kinds_of_files(tmp_path: Path) -> None:
    found = [{"a": "é", "b": 1}, {"a": "步", "b": 2}]
    (tmp_path / "a.json").write_text(json.dumps(found), encoding="utf-8")
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n\n" for row in found)
    write_lines(tmp_path / "a.jsonl", found)
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "a.jsonl").read_bytes())
    write_parquet(tmp_path / "a.parquet", found)
    for name in ("a.json", "a.jsonl.gz", "a.jsonl", "bom.jsonl", "a.parquet"):
        assert list(rows(tmp_path / name)) == found


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a"', r"a.jsonl, line 2: not JSON"),
        ("a.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n', "line 2: byte 7 is not UTF-8"),
        ("a.jsonl", b"\n\n", "holds no rows"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.json", b'{"a": 1}', "not a list of objects"),
        ("a.json", b"[", "not JSON"),
        ("a.parquet", b"PAR1 and then nothing", "no whole Parquet file"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.csv", b"a\n1\n", "use one of .parquet"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        list(rows(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_cut_parquet_file_is_one_line(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"a": "x" * 1000}] * 100)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="no whole Parquet file"):
        list(rows(path))
    with pytest.raises(DataError, match="is a folder"):
        list(rows(tmp_path))


def test_empty_cells_are_empty_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "A?", "answer": NaN}\n{"question": null, "answer": 2.0}\n')
    assert [(p.question, p.answer) for p in load_problems(str(path))] == [("A?", ""), ("", "2")]


def test_a_row_without_the_column_is_one_line(tmp_path: Path) -> None:
    for name, other in (("question", "answer"), ("answer", "question")):
        path = write_lines(tmp_path / "a.jsonl", [{"question": "A?", "answer": "1"}, {other: "?"}])
        with pytest.raises(DataError, match=f"row 1: has no {name!r}, the column of the {name}; add it"):
            list(load_problems(str(path)))


def test_what_only_later_rows_have_is_read_as_through_the_hub(tmp_path: Path) -> None:
    found = [{"question": "A?", "answer": "1"}, {"question": "B?", "answer": "2", "solution": "S", "id": "own"}]
    (tmp_path / "hub").mkdir()
    write_lines(tmp_path / "hub" / "train.jsonl", found)
    loaded = list(load_problems(str(write_lines(tmp_path / "hub.jsonl", found))))
    assert loaded == list(load_problems(str(tmp_path / "hub")))
    assert [(p.id, p.solution) for p in loaded] == [("hub/0", ""), ("own", "S")]


def test_a_file_is_not_what_it_is_called(tmp_path: Path) -> None:
    """One's own gsm8k.jsonl may have plain answers."""
    path = write_lines(tmp_path / "gsm8k.jsonl", [{"question": "A?", "answer": "42"}])
    assert next(load_problems(str(path))).answer == "42"
    with pytest.raises(DataError, match="has no '####'"):
        list(load_problems("gsm8k", file=str(path)))


def test_a_files_name_may_hold_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "split=test").mkdir()
    path = str(write_lines(tmp_path / "split=test" / "a.jsonl", [{"question": "A?", "answer": "1"}]))
    assert split_spec(path) == (path, "")
    assert split_spec(f"aime-2025={path}") == ("aime-2025", path)


def test_a_clone_of_gsm8k_is_read_by_its_configuration(tmp_path: Path) -> None:
    for config in ("main", "socratic"):
        write_parquet(
            tmp_path / "hub" / config / "train-0.parquet", [{"question": config, "answer": f"{config}\n#### 1"}]
        )
    (tmp_path / "hub" / "README.md").write_text(
        "---\nconfigs:\n"
        + "".join(
            f"- config_name: {c}\n  data_files:\n  - split: train\n    path: {c}/train-*\n"
            for c in ("main", "socratic")
        )
        + "---\n"
    )
    assert [p.question for p in load_problems("gsm8k", file=str(tmp_path / "hub"))] == ["main"]

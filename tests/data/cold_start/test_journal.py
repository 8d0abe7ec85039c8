from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from retool.data.cold_start.journal import Journal, Key, fingerprint, set_aside
from retool.errors import ConfigError, DataError

KEY = Key("a", 0, "f")


def fill(path: Path, count: int = 2) -> None:
    journal = Journal(path, {"--model": "m"})
    for n in range(count):
        journal.add(Key("a", n, "f"), {"text": f"said {n}\u2028\ud800"})
    journal.close()


def read(path: Path) -> dict[Key, dict[str, object]]:
    journal = Journal(path, {"--model": "m"})
    journal.close()
    return journal.entries


def test_what_was_added_is_read_back(tmp_path: Path) -> None:
    fill(tmp_path / "j")
    assert {key: entry["text"] for key, entry in read(tmp_path / "j").items()} == {
        Key("a", n, "f"): f"said {n}\u2028\ud800" for n in range(2)
    }


def test_every_torn_line_is_cut_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "j"
    fill(path)
    whole = path.read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == ord("\n")]
    for size in sorted({*range(0, len(whole), 11), *ends, *(end - 1 for end in ends)}):
        path.write_bytes(whole[:size])
        assert len(read(path)) == max(0, sum(end <= size for end in ends) - 1)
        journal = Journal(path, {"--model": "m"})
        journal.add(Key("z", 0, "f"), {"text": "later"})
        journal.close()
        assert Key("z", 0, "f") in read(path)


def test_the_last_entry_of_a_key_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", {})
    journal.add(KEY, {"failed": "x"})
    journal.add(KEY, {"text": "y"})
    journal.close()
    assert Journal(tmp_path / "j", {}).entries == {KEY: {**KEY._asdict(), "text": "y"}}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", {"--model": "m"})
    with pytest.raises(DataError, match="another 'retool cold-start' is writing it; wait for its end"):
        Journal(tmp_path / "j", {"--model": "m"})
    with pytest.raises(DataError, match="another 'retool cold-start'"):
        set_aside(tmp_path / "j", tmp_path / "old")
    journal.close()
    set_aside(tmp_path / "j", tmp_path / "old")
    assert not (tmp_path / "j").exists() and read(tmp_path / "old") == {}
    set_aside(tmp_path / "j", tmp_path / "old")  # nothing there is nothing to do


def test_other_settings_are_refused_and_what_can_be_made_again_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "j"
    fill(path)
    with pytest.raises(ConfigError, match=r"--model = 'n': .* was begun with 'm'; give that, another --out, or"):
        Journal(path, {"--model": "n"})
    assert len(read(path)) == 2
    anew = Journal(path, {"--model": "n"}, disposable=True)
    anew.close()
    assert anew.entries == {} and json.loads(path.read_text()) == {"settings": {"--model": "n"}}


def test_settings_that_gave_no_answer_bind_nobody(tmp_path: Path) -> None:
    path = tmp_path / "j"
    journal = Journal(path, {"--model": "typo"})
    journal.close()
    journal = Journal(path, {"--model": "another"})
    journal.add(Key("z", 0, "f"), {"failed": "HTTP 400", "attempts": 1})
    journal.close()
    fill(path)
    assert read(path)[Key("z", 0, "f")]["attempts"] == 1  # what was spent stays spent
    with pytest.raises(ConfigError, match="was begun with 'm'"):
        Journal(path, {"--model": "another"})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1}\n', "no journal of this command"),
        (b"PAR1\n", "no journal of this command"),
        (b"[]\n", "no journal of this command"),
        (b'{"settings": {"--model": "m"}}\n{"id": "a"}\n', "line 2: no entry of a journal"),
        (b'{"settings": {"--model": "m"}}\n\xff\n', "line 2: no entry of a journal"),
    ],
)
def test_a_file_of_other_making_is_left_alone(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "j"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        Journal(path, {"--model": "m"})
    assert path.read_bytes() == content
    path.unlink()
    Journal(path, {"--model": "m"}).close()  # and the refusal holds no lock


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="give a place that can be written"):
        Journal(tmp_path / "folder", {})


def test_a_full_disk_is_one_line_and_loses_nothing_else(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the line is written in part."""
    journal = Journal(tmp_path / "j", {"--model": "m"})
    journal.add(KEY, {"text": "x"})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        for _ in range(2):  # part of a line, and then none of it
            with pytest.raises(DataError, match=r"j: .*; make room and start again, nothing else is lost"):
                journal.add(Key("b", 0, "f"), {"text": "y" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(journal.entries) == [KEY]
    journal.close()
    assert list(read(tmp_path / "j")) == [KEY]


def test_a_fingerprint_tells_texts_apart() -> None:
    assert fingerprint("a", "bc") != fingerprint("ab", "c") != fingerprint("abc")
    assert fingerprint("a", "b") == fingerprint("a", "b") and fingerprint("\ud800")

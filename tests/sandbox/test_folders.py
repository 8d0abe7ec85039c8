import os
from pathlib import Path

from retool.sandbox.folders import empty, is_pristine, wipe


def test_wipes_deep_and_wide_trees(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    here = os.getcwd()
    os.chdir(folder)
    try:
        for _ in range(300):  # 6,000 characters: longer than PATH_MAX
            os.mkdir("d" * 20)
            os.chdir("d" * 20)
        Path("file").write_text("x")
    finally:
        os.chdir(here)
    for index in range(50):
        (folder / f"file{index}").write_text("x")
    os.mkfifo(folder / "fifo")
    assert wipe(str(folder))
    assert not folder.exists()


def test_follows_no_link_and_mends_permissions(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    folder = tmp_path / "run"
    (folder / "locked" / "inner").mkdir(parents=True)
    (folder / "link").symlink_to(outside)
    (folder / "locked" / "link").symlink_to(outside / "kept")
    (folder / "locked").chmod(0)
    folder.chmod(0)
    assert wipe(str(folder))
    assert not folder.exists()
    assert (outside / "kept").read_text() == "x"


def test_missing_folder_is_gone_already(tmp_path: Path) -> None:
    assert wipe(str(tmp_path / "none"))


def test_is_pristine(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert not is_pristine(str(folder), 0o700)
    folder.mkdir()
    folder.chmod(0)
    assert is_pristine(str(folder), 0o1777)
    assert folder.stat().st_mode & 0o7777 == 0o1777
    (folder / "a").write_text("x")
    assert not is_pristine(str(folder), 0o1777)
    link = tmp_path / "link"
    other = tmp_path / "other"
    other.mkdir(0o755)
    link.symlink_to(other)
    assert not is_pristine(str(link), 0o700)
    assert other.stat().st_mode & 0o777 != 0o700


def test_empty_leaves_the_folder_itself(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "c").write_text("x")
    (folder / "a").chmod(0)
    (folder / "link").symlink_to(tmp_path)
    assert empty(str(folder))
    assert is_pristine(str(folder), 0o700)
    assert empty(str(folder))

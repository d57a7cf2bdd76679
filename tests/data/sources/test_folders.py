"""One walk for every command: each folder once, whatever links to it; nothing is waited for or lost without a word."""

import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from raydistill.data.sources.folders import files_below
from raydistill.errors import DataError
from raydistill.storage.filesystems import read_file


def walked(root: Path) -> tuple[list[str], dict[str, int]]:
    ignored = Counter[str]()
    return [path.removeprefix(f"{root}/") for path in files_below(str(root), ignored)], dict(ignored)


def tree(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target, target_is_directory=target.is_dir())


def test_two_folders_that_link_to_each_other_are_read_once(tmp_path):
    root = tree(tmp_path / "set", "a/0.png", "b/0.png", "b/deep/1.png")
    link(root / "a" / "to_b", root / "b")
    link(root / "b" / "to_a", root / "a")
    link(root / "b" / "deep" / "to_top", root)
    files, ignored = walked(root)
    assert files == ["a/0.png", "b/0.png", "b/deep/1.png"]
    assert ignored == {"links to folders that are read elsewhere (a/to_b is b, b/deep/to_top is ., b/to_a is a)": 3}


def test_a_link_to_a_folder_outside_is_followed_once_and_its_second_place_is_named(tmp_path):
    outside = tree(tmp_path / "outside", "0.png", "deep/1.png")
    root = tree(tmp_path / "set", "c/0.png")
    link(root / "a" / "pictures", outside)
    link(root / "b", outside)
    link(root / "d", outside / "deep")
    files, ignored = walked(root)
    assert files == ["a/pictures/0.png", "a/pictures/deep/1.png", "c/0.png"]
    (what,) = ignored
    assert "b is a/pictures" in what
    assert "d is a/pictures/deep" in what


def test_links_that_lead_to_themselves_are_files_that_cannot_be_read(tmp_path):
    root = tree(tmp_path / "set", "a/0.png")
    link(root / "a" / "self.png", root / "a" / "self.png")
    link(root / "one", root / "two")
    link(root / "two", root / "one")
    assert walked(root) == (["a/0.png", "a/self.png", "one", "two"], {})
    with pytest.raises(OSError, match="symbolic links"):
        read_file(f"{root}/a/self.png", 100)


def test_links_that_lead_round_outside_and_above_end(tmp_path):
    root = tree(tmp_path / "up" / "set", "a/0.png")
    other = tree(tmp_path / "other", "1.png")
    link(other / "back", other)
    link(other / "to_set", root)
    link(root / "a" / "other", other)
    link(root / "a" / "above", tmp_path / "up")
    files, ignored = walked(root)
    assert files == ["a/0.png", "a/other/1.png"]
    assert sum(ignored.values()) == 3


def test_the_root_may_be_a_link_and_end_in_a_slash(tmp_path):
    root = tree(tmp_path / "set", "a/0.png")
    link(tmp_path / "linked", root)
    assert walked(tmp_path / "linked")[0] == ["a/0.png"]


def test_links_to_files_are_files_and_broken_ones_are_kept_to_be_refused(tmp_path):
    root = tree(tmp_path / "set", "a/0.png")
    outside = tree(tmp_path / "outside", "x.png") / "x.png"
    link(root / "a" / "linked.png", outside)
    (root / "a" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    assert walked(root) == (["a/0.png", "a/broken.png", "a/linked.png"], {})
    assert read_file(str(root / "a" / "linked.png"), 100) == b"x.png"
    with pytest.raises(OSError, match="No such file"):
        read_file(str(root / "a" / "broken.png"), 100)


def test_pipes_and_devices_are_files_that_cannot_be_read(tmp_path):
    root = tree(tmp_path / "set", "a/0.png")
    os.mkfifo(root / "a" / "pipe.png")
    (root / "a" / "zero.png").symlink_to("/dev/zero")
    assert walked(root) == (["a/0.png", "a/pipe.png", "a/zero.png"], {})
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(OSError, match="regular file"):
            read_file(str(root / "a" / name), 100)


def test_names_that_are_no_text_are_found_and_written(tmp_path):
    root = tree(tmp_path / "set", "a/0.png")
    (root / os.fsdecode(b"caf\xe9")).mkdir()
    link(root / os.fsdecode(b"caf\xe9") / "again", root)
    files, ignored = walked(root)
    assert [os.fsencode(name) for name in files] == [b"a/0.png"]
    assert list(ignored) == [r"links to folders that are read elsewhere ($'caf\xe9/again' is .)"]


@pytest.mark.timeout(20)
def test_folders_within_folders_without_end_take_no_longer_for_each(tmp_path):
    os.mkdir(tmp_path / "set")
    folder = os.open(tmp_path / "set", os.O_RDONLY)
    try:
        for depth in range(2500):  # paths of more than 4,096 bytes lead nowhere
            if depth in (0, 1900):
                os.close(os.open(f"{depth}.png", os.O_CREAT, dir_fd=folder))
            os.mkdir("d", dir_fd=folder)
            above, folder = folder, os.open("d", os.O_RDONLY, dir_fd=folder)
            os.close(above)
        root = str(tmp_path / "set")
        with pytest.raises(DataError, match=r"^.{1,500}: cannot be listed \(File name too long\)$"):
            files_below(root, Counter())
        top = f"{root}{'/d' * 1950}"
        os.symlink(tmp_path, f"{top}/to_top")
        subprocess.run(["rm", "-r", f"{top}/d"], check=True)
        files, ignored = walked(tmp_path / "set")
        assert files == ["0.png", f"{'d/' * 1900}1900.png"]
        assert len(ignored) == 1
    finally:
        os.close(folder)
        subprocess.run(["rm", "-r", tmp_path / "set"], check=True)  # pytest's own way calls itself at each depth


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_root_that_is_no_folder_is_called_so(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    with pytest.raises(DataError, match=f"{kind}: neither a folder nor a regular file"):
        files_below(str(tmp_path / kind), Counter())


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), ProcessLookupError(3, "gone")])
def test_a_folder_that_vanishes_while_its_neighbours_are_listed_costs_none_of_them(tmp_path, monkeypatch, error):
    """As those of processes do, where a link leads to them."""
    root, scandir = tree(tmp_path / "set", "a/0.png", "b/0.png"), os.scandir

    def gone(folder: str) -> object:
        if folder.endswith("/a"):
            raise error
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", gone)
    assert walked(root) == (["b/0.png"], {"folders that vanished while they were listed": 1, "empty folders": 1})

"""Atomic writing, full disks, broken UTF-8."""

import errno
import gzip
import os
from pathlib import Path

import pytest

from mhmoe_fairseq.common.errors import UserError
from mhmoe_fairseq.common.files import (
    atomic_folder,
    atomic_open,
    atomic_path,
    read_json,
    read_utf8_lines,
    refuse_path_separator,
    write_json,
)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        with atomic_open(path) as stream:
            stream.write(b"half of the new")
            raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_open(path) as stream:
        stream.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_a_folder_takes_its_place_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    for content in ("old", "new"):
        with atomic_folder(path) as made:
            assert not list(made.iterdir())
            (made / content).write_text(content)
        assert [file.name for file in path.iterdir()] == [content] and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RuntimeError):
        with atomic_folder(path) as made:
            (made / "half").write_text("half")
            raise RuntimeError
    assert [file.name for file in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError):
        with atomic_folder(path) as made:
            made.rmdir()  # when the earlier one has made room there is nothing to take its place
    assert [file.name for file in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]


def test_folders_under_other_names_are_replaced_where_they_are(tmp_path, monkeypatch):
    there, link = tmp_path / "there", tmp_path / "link"
    there.mkdir()
    link.symlink_to(there)
    monkeypatch.chdir(there)
    for path, name in ((Path("."), "first"), (link, "second")):
        with atomic_folder(path) as made:
            (made / name).write_text("new")
        assert [file.name for file in there.iterdir()] == [name]
        os.chdir(there)  # the folder of that name is another one now
    assert link.is_symlink() and sorted(tmp_path.iterdir()) == [link, there]


def test_a_folder_that_cannot_be_renamed_has_new_contents_or_its_own(tmp_path, monkeypatch):
    volume = tmp_path / "volume"
    (volume / "old" / "more").mkdir(parents=True)
    monkeypatch.setattr(Path, "is_mount", lambda path: path == volume)
    monkeypatch.setattr(Path, "rename", lambda path, to: pytest.fail() if volume in (path, to) else os.rename(path, to))
    with pytest.raises(RuntimeError):
        with atomic_folder(volume) as made:
            (made / "new").write_text("half")
            raise RuntimeError
    assert [path.name for path in volume.rglob("*")] == ["old", "more"]
    with atomic_folder(volume) as made:
        (made / "new").write_text("new")
    assert [path.name for path in volume.rglob("*")] == ["new"] and list(tmp_path.iterdir()) == [volume]


def test_a_full_disk_is_one_clear_line_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    (tmp_path / ".a.txt.tmp").symlink_to("/dev/full")  # the kernel's own full disk
    with pytest.raises(UserError, match="a.txt: cannot be written \\(no space left on device\\): free some space"):
        with atomic_open(tmp_path / "b.txt"), atomic_open(path) as stream:  # the full one is named
            stream.write(b"new" * 100_000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_other_errors_while_writing_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(OSError) as caught:
        with atomic_path(tmp_path / "a.txt"):
            raise OSError(errno.EACCES, "Permission denied")
    assert not isinstance(caught.value, UserError)


def test_invalid_utf8_names_file_and_offset(tmp_path):
    content = "größe\nzwei\n".encode() + b"ab\xffc\n"
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"a.txt: invalid UTF-8 at byte {content.index(0xFF)} \\(0xff\\)"):
        list(read_utf8_lines(path))
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress(b"\xef\xbb\xbf" + content))
    with pytest.raises(UserError, match=f"a.txt.gz: invalid UTF-8 at byte {content.index(0xFF) + 3}"):
        list(read_utf8_lines(packed))


def test_lines_end_as_on_any_system(tmp_path):
    path = tmp_path / "a.txt"
    for content in (b"one\ntwo\n\nthree", b"one\r\ntwo\r\n\r\nthree\r\n", b"one\rtwo\r\rthree\r"):
        path.write_bytes(content)
        assert list(read_utf8_lines(path)) == ["one", "two", "", "three"]


def test_a_path_that_fairseq_would_cut_is_refused(tmp_path, monkeypatch):
    refuse_path_separator(tmp_path / "a", "--dest")
    with pytest.raises(UserError, match="--dest a:b: must have no ':' in its path"):
        refuse_path_separator(Path("a:b"), "--dest")
    (tmp_path / "c:d").mkdir()
    monkeypatch.chdir(tmp_path / "c:d")
    with pytest.raises(UserError, match="--dest data: must have no ':' in its path .*c:d/data"):
        refuse_path_separator(Path("data"), "--dest")


def test_a_damaged_gzip_is_named(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"some text\n" * 1000)[:-12])
    with pytest.raises(UserError, match="a.txt.gz: damaged gzip"):
        list(read_utf8_lines(path))


def test_json_round_trip_and_broken_json(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"name": "größe", "list": [1, None]})
    assert read_json(path) == {"name": "größe", "list": [1, None]}
    path.write_text('{\n"a": }')
    with pytest.raises(UserError, match="a.json:2: not valid JSON"):
        read_json(path)

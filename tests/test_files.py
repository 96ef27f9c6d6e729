"""Paths, writes and reads: what is meant is done, or refused in a sentence."""

import json
import math
import os
import pathlib

import pytest

from cvjax import files
from cvjax.errors import UserError


def test_paths(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/her")
    monkeypatch.chdir(tmp_path)
    assert files.user_path("~/runs", "--x") == pathlib.Path("/home/her/runs")
    assert files.user_path("a/b c", "--x") == tmp_path / "a" / "b c"
    assert files.user_path("c:é [1]", "--x") == tmp_path / "c:é [1]"


@pytest.mark.parametrize(
    "given",
    [
        *("", " ", "gs://bucket/x", "s3:/bucket", "file:///x", "--seed=1", "-x", "a\0b"),
        *("$HOME/x", "${RUNS}/x", "%TEMP%", "C:\\runs\\x"),
        *("a\nb", "a\udcff", "x" * 256, "ü" * 128, "~nobody-of-this-name/x"),
    ],
)
def test_what_is_no_path(given):
    with pytest.raises(UserError, match="--there"):
        files.user_path(given, "--there")


def test_json_has_no_nan(tmp_path):
    files.write_json(tmp_path / "x.json", {"a": math.nan, "b": [math.inf, (1, 0.5)]})
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "a": None,
        "b": [None, [1, 0.5]],
    }


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "x"
    with files.replacing(path) as first, files.replacing(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["x"]


def test_a_failed_write_changes_nothing(tmp_path):
    path = tmp_path / "x"
    path.write_text("old")

    def fail():
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"x cannot be written \(No space left"):
        fail()
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(
    "content",
    ["", "null", "[1]", "{", "{}", '{"a": "x"}', '{"a": true}', "\xff", "[" * 99999],
)
def test_json_that_is_not_what_it_must_be(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode("latin1"))
    with pytest.raises(UserError, match=f"{path} is damaged.*; delete it"):
        files.read_json(path, {"a": int}, "delete it")


def test_mode_of_files(tmp_path):
    files.write_bytes(tmp_path / "x", b"")
    (tmp_path / "y").write_bytes(b"")
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "far").mkdir()
    link, target = tmp_path / "link", tmp_path / "far" / "x"
    link.symlink_to(target)
    for content in (b"new", b"again"):
        files.write_bytes(link, content)
        assert link.is_symlink() and target.read_bytes() == content
    assert os.listdir(tmp_path / "far") == ["x"]


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/null")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "folder").mkdir()
    for name in sorted(os.listdir(tmp_path)):
        with pytest.raises(UserError, match=f"{name} is no file but"):
            files.write_bytes(tmp_path / name, b"")
    assert (tmp_path / "pipe").is_fifo()

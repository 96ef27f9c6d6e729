"""Folders and files that may not be looked into or written to."""

import json
import os
import pathlib
import shutil
import tempfile

import pytest

from cvjax import compare
from cvjax.comparison import runs
from cvjax.errors import UserError
from cvjax.storage import workdir
from cvjax.training import default_config

NOBODY = 65534


@pytest.fixture
def folder():
    """A folder that others may enter; the test goes on as a user who is not root."""
    path = pathlib.Path(tempfile.mkdtemp(prefix="cvjax-permissions-", dir="/tmp"))
    path.chmod(0o777)
    yield path
    for place, folders, _ in os.walk(path):
        for name in folders:
            os.chmod(os.path.join(place, name), 0o777)
    shutil.rmtree(path)


@pytest.fixture
def as_nobody():
    """Call it when all is in place: root may read and write everything."""
    user = os.geteuid()

    def change():
        if user == 0:
            os.seteuid(NOBODY)

    yield change
    os.seteuid(user)


def make_run(path: pathlib.Path, mode: int = 0o755) -> pathlib.Path:
    path.mkdir()
    config = default_config("mlp")
    config.seed = len(path.name)
    (path / "config.json").write_text(json.dumps({"config": config.to_dict(), "seed": 1}))
    path.chmod(mode)
    return path


def test_a_run_in_a_closed_folder_is_no_missing_run(folder, as_nobody):
    closed = make_run(folder / "closed", 0o000)
    as_nobody()
    with pytest.raises(UserError, match=r"config.json cannot be read \(Permission denied"):
        workdir.read_manifest(closed)
    with pytest.raises(UserError, match="it does not exist"):
        workdir.read_manifest(folder / "missing")


def test_compare_shows_the_others(folder, as_nobody):
    closed, still = make_run(folder / "closed", 0o000), make_run(folder / "still open")
    as_nobody()
    found, notes = runs.find_runs([str(closed), str(still)])
    assert found == [closed, still] and not notes
    rows, notes = compare.compare_runs([str(closed), str(still)], "test/error")
    assert [run.folder for row in rows for run in row.runs] == [still]
    (note,) = notes
    assert note.startswith(f"{closed} is left out") and "Permission denied" in note


def test_compare_goes_on_after_a_link_to_itself_and_closed_rows(folder, as_nobody):
    (folder / "loop").symlink_to("loop")
    good, closed = make_run(folder / "good one"), make_run(folder / "closed rows")
    (closed / "metrics.jsonl").touch(mode=0o000)
    (folder / "closed").mkdir(mode=0o000)
    as_nobody()
    rows, notes = compare.compare_runs([str(folder)], "test/error")
    assert [run.folder for row in rows for run in row.runs] == [good]
    assert any(f"{closed} is left out" in note for note in notes)
    assert any(f"{folder}/closed" in note for note in notes)
    with pytest.raises(UserError, match="names no run"):
        runs.find_runs([str(folder / "loop")])


@pytest.mark.parametrize("below", ["run", "a/b/run"])
def test_no_workdir_below_a_closed_folder(folder, as_nobody, below):
    (folder / "closed").mkdir(mode=0o000)
    as_nobody()
    with (
        pytest.raises(UserError, match="choose another --workdir"),
        workdir.lock(folder / "closed" / below),
    ):
        pass


def test_checkpoints_that_cannot_be_saved_are_noticed_at_the_start(folder, as_nobody):
    run = make_run(folder / "run", 0o777)
    (run / "checkpoints").mkdir(mode=0o555)
    as_nobody()
    with (
        workdir.lock(run),
        pytest.raises(UserError, match=r"checkpoints/.*; choose another"),
    ):
        workdir.check_going_on(run)
    assert workdir.check_output(run / "net", "--output") == run / "net"


def test_a_lock_for_what_cannot_be_read_leaves_no_folder(folder, as_nobody):
    closed = make_run(folder / "closed", 0o000)
    as_nobody()
    with pytest.raises(UserError), workdir.lock(folder / "new"):
        workdir.read_manifest(closed)
    assert not (folder / "new").exists()

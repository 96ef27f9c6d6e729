"""A run's folder: one process in it, a record of what it is, graceful shutdown."""

import errno
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import filelock
import jax
import numpy as np
import pytest

from cvjax import cli, errors
from cvjax.files import write_json
from cvjax.storage import provenance, workdir
from cvjax.training import interrupt

REPOSITORY = pathlib.Path(__file__).parents[1]
TEXT = {"capture_output": True, "text": True, "check": True}


# Lock


HOLD = """
import sys, time
from cvjax.storage import workdir
with workdir.lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    folder = tmp_path / "new" / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=REPOSITORY, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout.readline() == b"held\n"
        for _ in range(2):
            with pytest.raises(errors.UserError) as caught, workdir.lock(folder):
                pass
            assert str(folder) in str(caught.value)
            assert f"process {process.pid} on " in str(caught.value)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with workdir.lock(folder):
        pass


def test_the_lock_is_released_upon_errors(tmp_path, monkeypatch):
    locks = []  # kept here, for the garbage collector would release them too
    create = filelock.FileLock
    monkeypatch.setattr(
        filelock, "FileLock", lambda *a, **kw: locks.append(create(*a, **kw)) or locks[-1]
    )
    with pytest.raises(ZeroDivisionError), workdir.lock(tmp_path):
        assert locks[0].is_locked
        raise ZeroDivisionError
    assert not locks[0].is_locked


def test_the_same_process_is_refused_too(tmp_path):
    with workdir.lock(tmp_path):
        for _ in range(2):
            with pytest.raises(errors.UserError, match="in use"), workdir.lock(tmp_path):
                pass


# Folder and files


def test_a_folder_among_the_files_of_a_run_is_refused(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}")  # of something else
    assert workdir.check_writable(run / "checkpoints/a") == run / "checkpoints/a"
    (run / "config.json").write_text('{"config": ')  # damaged
    with pytest.raises(errors.UserError, match="among the files of the run"):
        workdir.check_writable(run / "checkpoints/a")
    (run / "config.json").write_text('{"config": {}}')
    assert workdir.check_writable(run / "pictures") == run / "pictures"
    for inside in ("checkpoints", "checkpoints/100", "tensorboard/other"):
        with pytest.raises(errors.UserError, match=f"--output .*{inside} .*{run};"):
            workdir.check_writable(run / inside, "--output")
    assert not (run / "tensorboard").exists()
    link = tmp_path / "link"
    link.symlink_to(run / "checkpoints")
    with pytest.raises(errors.UserError, match="among the files of the run"):
        workdir.check_writable(link / "new")
    assert workdir.check_writable(run) == run


def test_check_writable_creates_parents_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = workdir.check_writable("a/b")
    assert folder == tmp_path / "a" / "b" and folder.is_absolute()
    assert list(folder.iterdir()) == []


def test_a_file_in_the_way_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for bad in (file, file / "run"):
        with pytest.raises(errors.UserError, match=f"workdir {bad} cannot be written"):
            workdir.check_writable(bad)


def test_the_root_of_all_folders_is_refused():
    with pytest.raises(errors.UserError, match="--workdir is /, the root of all folders"):
        workdir.check_writable("/")
    with pytest.raises(errors.UserError, match="--output net/ is a folder"):
        workdir.check_output("net/", "--output")


def test_an_unwritable_folder_is_refused():
    # Root may write to folders without permission, but not to /proc.
    with pytest.raises(errors.UserError, match="choose another --workdir"):
        workdir.check_writable("/proc/self/fd")


def test_an_interrupted_write_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(workdir.os, "replace", kill)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


# Manifest


def test_manifest(tmp_path):
    config = {"seed": 3, "optim": {"learning_rate": 0.1}}
    written = workdir.write_manifest(tmp_path, config)
    assert os.listdir(tmp_path) == ["config.json"]
    read = workdir.read_manifest(tmp_path)
    assert read == written
    assert read["config"] == config and read["seed"] == 3
    assert read["versions"]["jax"] == jax.__version__
    assert read["versions"]["numpy"] == np.__version__
    assert read["versions"]["python"] == sys.version.split()[0]
    assert set(read["versions"]) >= {"cvjax", "jaxlib", "flax", "optax", "orbax"}
    assert read["device"]["platform"] == "cpu" and read["device"]["count"] == 1
    assert read["prng_impl"] == "threefry2x32"
    assert read["command"] == [*cli.command_name().split(), *sys.argv[1:]]
    assert read["created"][4] == "-" and read["created"][-6] in "+-"


def test_settings_of_older_runs_have_their_names_of_today(tmp_path):
    workdir.write_manifest(tmp_path, {"model": {"name": "resnet", "walk": "rolled"}})
    model = workdir.read_manifest(tmp_path)["config"]["model"]
    assert model == {"name": "resnet", "loop": "rolled"}


def test_git_commit_of_this_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=b"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.strip()

    monkeypatch.setattr(provenance.cvjax, "__file__", str(tmp_path / "cvjax/__init__.py"))
    assert provenance._git() is None
    git("init")
    (tmp_path / "cvjax").mkdir()
    file = tmp_path / "cvjax" / "__init__.py"
    file.write_text("")
    git("add", ".")
    git("commit", "-m", "x")
    commit = git("rev-parse", "HEAD")
    assert provenance._git() == {"commit": commit, "dirty": False}
    file.write_text("x")
    assert provenance._git() == {"commit": commit, "dirty": True}
    # Installed into an environment within another project's checkout.
    installed = tmp_path / "venv" / "cvjax" / "__init__.py"
    installed.parent.mkdir(parents=True)
    monkeypatch.setattr(provenance.cvjax, "__file__", str(installed))
    assert provenance._git() is None


@pytest.mark.parametrize("content", [None, "{"])
def test_an_unreadable_manifest_is_a_user_error(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(errors.UserError, match=str(tmp_path / "config.json")):
        workdir.read_manifest(tmp_path)


def test_config_differences():
    old = {
        "seed": 0,
        "model": {"name": "resnet", "stages": (3, 3, 3), "depth": 20},
        "optim": {"learning_rate": 0.1, "momentum": 0.9, "drops": {"a": 1}},
        "data": {"name": "digits"},
    }
    new = {
        "seed": 0.0,
        "model": {"name": "resnet", "stages": [3, 3, 3], "depth": 56},
        "optim": {"learning_rate": 0.05, "nesterov": True, "drops": 1},
        "data": {"name": None},
    }
    assert workdir.config_differences(old, new) == [
        "data.name was 'digits', now None",
        "model.depth was 20, now 56",
        "optim.drops was absent, now 1",
        "optim.drops.a was 1, now absent",
        "optim.learning_rate was 0.1, now 0.05",
        "optim.momentum was 0.9, now absent",
        "optim.nesterov was absent, now True",
    ]
    assert workdir.config_differences(old, old) == []


# Interruption


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_sets_the_flag(name, capfd):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    with interrupt.watch() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.requested and stop.signal_name == name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before
    assert "Stopping after this step" in capfd.readouterr().err


def test_a_second_sigterm_changes_nothing():
    with interrupt.watch() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_handlers_come_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), interrupt.watch():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_nothing_is_set():
    seen = []

    def run():
        before = signal.getsignal(signal.SIGTERM)
        with interrupt.watch() as stop:
            seen.append((stop.requested, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(False, True)]


# File systems without locks


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with workdir.lock(tmp_path):
        for _ in range(2):
            refused = pytest.raises(errors.WorkdirInUse, match=r"delete .*/\.lock\.soft")
            with refused, workdir.lock(tmp_path):
                pass
    with workdir.lock(tmp_path):
        pass


def test_a_killed_holder_on_a_file_system_without_locks(tmp_path, monkeypatch):
    """On this machine the next process takes over; who waits for another machine's is
    shown how to go on."""

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", flock)
    soft = tmp_path / ".lock.soft"
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], **TEXT)
    soft.write_text(f"{int(dead.stdout)}\n{socket.gethostname()}\n")
    os.utime(soft, (0, 0))
    with workdir.lock(tmp_path):
        pass
    soft.write_text(f"{os.getpid()}\nanother-machine\n")
    os.utime(soft, (0, 0))
    refused = pytest.raises(errors.WorkdirInUse, match=r"delete .*/\.lock\.soft")
    with refused, workdir.lock(tmp_path):
        pass
    soft.unlink()
    with workdir.lock(tmp_path):
        pass


def test_what_stands_in_the_way_of_the_lock_is_named(tmp_path):
    (tmp_path / ".lock").mkdir()
    lock = workdir.lock(tmp_path)
    with pytest.raises(errors.UserError, match=r"\.lock cannot be written"), lock:
        pass


def test_unfinished_files_of_a_killed_process_go(tmp_path):
    (tmp_path / ".summary.json.x.tmp").write_text("")
    with workdir.lock(tmp_path):
        assert not list(tmp_path.glob("*.tmp"))


def test_a_folder_made_for_nothing_goes(tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("old", "new", "used"):
        folder = tmp_path / name
        with pytest.raises(errors.UserError, match="refused"), workdir.lock(folder):
            if name == "used":
                (folder / "config.json").write_text("")
            raise errors.UserError("refused")
    assert sorted(os.listdir(tmp_path)) == ["old", "used"]


# A run that stands still


@pytest.mark.parametrize(
    "does", ["time.sleep(3)", "while time.monotonic() < end: sum(range(10_000))"]
)
def test_a_run_that_waits_for_something_says_so(does):
    """In a process of its own: here, threads of other tests may still compute."""
    code = (
        "import time\nfrom cvjax.training import interrupt\nend = time.monotonic() + 3\n"
        f"with interrupt.warn_of_standstill(seconds=1):\n    {does}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, **TEXT)
    warnings = done.stderr.count("Nothing was computed for 1 seconds")
    assert warnings == ("sleep" in does)


def test_the_summary_of_an_unfinished_run(tmp_path):
    with pytest.raises(errors.UserError, match=r"is not finished .*goes on with it"):
        workdir.read_summary(tmp_path)

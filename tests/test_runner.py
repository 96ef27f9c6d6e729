"""Runs shared out over processes: nobody waits, nothing is trained twice, none is lost."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from cvjax.errors import DivergedError, InterruptedRun, UserError
from cvjax.files import write_json
from cvjax.storage import workdir
from cvjax.training import default_config, interrupt, trainer
from experiments import processes, runner

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def trained(monkeypatch):
    """Training that only takes the workdir, and writes what a finished run has."""
    order = []

    def train(config, folder):
        with workdir.lock(folder):
            if not (folder / "summary.json").exists():
                config()
                order.append(folder.name)
                (folder / "summary.json").write_text("{}")

    monkeypatch.setattr(runner, "train_and_evaluate", train)
    monkeypatch.setattr(runner, "parse_config", lambda config: None)
    return order


def nothing():
    pass


def test_what_others_hold_is_left_to_them(trained, tmp_path):
    a, b, c = (tmp_path / name for name in "abc")
    done = []
    with workdir.lock(a):
        finished = runner.train_all(
            {a: nothing, b: nothing, c: nothing}, lambda: done.append(list(trained))
        )
    assert finished == [b, c]
    assert trained == ["b", "c"]
    assert done == [["b"], ["b", "c"]]
    assert runner.train_all({a: nothing, b: nothing}, nothing) == [a, b]
    assert trained == ["b", "c", "a"]


def test_who_finds_nothing_finished_leaves_the_results_to_others(trained, tmp_path):
    with workdir.lock(tmp_path / "a"), pytest.raises(SystemExit) as end:
        runner.train_all({tmp_path / "a": nothing})
    assert end.value.code == 0 and not trained


def test_a_run_whose_process_died_meanwhile_is_taken_over(trained, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    with contextlib.ExitStack() as other_process:
        other_process.enter_context(workdir.lock(a))
        assert runner.train_all({a: nothing, b: other_process.close}) == [a, b]
    assert trained == ["b", "a"]


def test_a_run_of_another_length_is_not_gone_on_with(trained, tmp_path):
    """Its learning rates have fallen to nothing by its end, and would rise again."""
    config = default_config("mlp")
    (tmp_path / "b").mkdir()
    write_json(tmp_path / "b/config.json", {"config": config.to_dict()})
    config.total_steps += 1
    with pytest.raises(
        UserError, match=r"b has a run of 1000 steps, and this one is of 1001"
    ):
        runner.train_all({tmp_path / "a": nothing, tmp_path / "b": config})
    assert not trained
    config.optim.schedule = "constant"
    runner._refuse_other_length(tmp_path / "b", config)


def test_a_run_that_diverges_does_not_stop_the_others(trained, tmp_path):
    def diverge():
        raise DivergedError("not finite at step 3.")

    runs = {tmp_path / "a": diverge, tmp_path / "b": nothing}
    with pytest.raises(DivergedError, match=r"1 of 2 runs diverged \(a\)"):
        runner.train_all(runs, nothing)
    assert trained == ["b"]
    # The results of the others are written before that is said.
    reported = []
    raises = pytest.raises(DivergedError, match="the results are of the others")
    with raises, runner.trained(runs) as finished:
        reported += finished
    assert reported == [tmp_path / "b"]
    raises = pytest.raises(DivergedError, match=r"1 of 1 runs diverged \(a\)\.$")
    with raises, runner.trained({tmp_path / "a": diverge}):
        raise AssertionError("there is nothing to report")


def test_settings_of_all_runs_are_checked_before_the_first(tmp_path):
    good, bad = default_config("mlp"), default_config("mlp")
    bad.data.batch_size = 0
    with pytest.raises(UserError, match=r"^b: data.batch_size must be 1 or more"):
        runner.train_all({tmp_path / "a": good, tmp_path / "b": bad})
    assert not any(tmp_path.iterdir())


def test_a_signal_between_two_runs_is_not_lost(trained, tmp_path):
    """It may come when a run has made its last step, and ends as if there were none."""

    def signalled():
        with interrupt.watch():
            os.kill(os.getpid(), signal.SIGTERM)

    done = []
    runs = {tmp_path / "a": signalled, tmp_path / "b": nothing}
    with pytest.raises(InterruptedRun, match="Stopped by SIGTERM after a"):
        runner.train_all(runs, lambda: done.append(1))
    assert trained == ["a"] and done == [1]


def test_a_signal_while_a_run_is_set_up_stops_it_before_its_first_step(
    monkeypatch, tmp_path
):
    load = trainer.load_data

    def signalled(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return load(*arguments)

    monkeypatch.setattr(trainer, "load_data", signalled)
    with pytest.raises(InterruptedRun, match="Stopped by SIGTERM and saved at step 0"):
        runner.train_all({tmp_path / "a": default_config("mlp")})
    assert not (tmp_path / "a" / "summary.json").exists()


def test_what_is_finished_is_not_reported_again(trained, tmp_path):
    done = []
    for _ in range(2):
        runner.train_all({tmp_path / "a": nothing}, lambda: done.append(1))
    assert done == [1]


def test_more_processes_than_cores_are_refused(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes are more than the 1 cores of this"):
        runner.run_in_processes(2)


def test_a_measurement_is_kept_for_its_key(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return {"n": len(calls), "pair": (1, 2)}

    path = tmp_path / "measured.json"
    for _ in range(2):
        assert runner.cached(path, {"images": (3,)}, measure) == {"n": 1, "pair": [1, 2]}
    assert runner.cached(path, {"images": (4,)}, measure)["n"] == 2
    path.write_text("[]")  # of another program
    assert runner.cached(path, {"images": (4,)}, measure)["n"] == 3
    for number, value in enumerate((None, {}, {"n": 7, "pair": [1, 2]}), start=4):
        path.write_text(json.dumps({**json.loads(path.read_text()), "value": value}))
        assert runner.cached(path, {"images": (4,)}, measure)["n"] == number


def test_results_have_one_shape(tmp_path):
    runs = [{"seed": 0}]
    results = runner.write_results(tmp_path, "mine", "quick", table=[], runs=runs, data="x")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert {*runner.RESULTS, "data"} == results.keys()
    assert results["runs"] == runs and results["provenance"]["git"]


PARENT = """
import sys, time
from absl import flags
from cvjax import cli
from cvjax.training import interrupt
from experiments import runner
from cvjax.errors import InterruptedRun
flags.DEFINE_integer("processes", 2, "")
flags.DEFINE_string("folder", None, "")
flags.DEFINE_integer("code", 0, "")

def main(arguments):
    if flags.FLAGS.processes > 1:
        runner.run_in_processes(flags.FLAGS.processes)
        print("all done")
        return
    import os, pathlib
    with interrupt.watch() as stop:
        cores = len(os.sched_getaffinity(0))
        (pathlib.Path(flags.FLAGS.folder) / str(os.getpid())).write_text(str(cores))
        print("to stderr", file=sys.stderr)
        print("to stdout")
        if flags.FLAGS.code:
            sys.exit(flags.FLAGS.code)
        folder = pathlib.Path(flags.FLAGS.folder)
        while not stop.requested and len(list(folder.iterdir())) < 3:
            time.sleep(0.05)
    if stop.requested:
        raise InterruptedRun("saved.")

if __name__ == "__main__":
    cli.run(main)
"""

needs_two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two cores",
)


def test_one_process_per_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3)), raising=False)
    for quota, wanted in ((0, 3), (2, 2), (8, 3)):
        monkeypatch.setattr(processes, "cpu_limit", lambda quota=quota: quota)
        assert processes.one_per_core() == wanted
    monkeypatch.delattr(os, "sched_getaffinity")
    for cores, wanted in ((16, 4), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert processes.one_per_core() == wanted


def test_a_process_of_many_starts_no_others():
    for given in (["--processes=2"], ["-processes", "2"], []):
        line = ["-m", "experiments.x", "--seeds=2", *given, "--steps", "3"]
        assert processes._alone(line) == [*line[:3], *line[-2:], "--processes=1"]


def start(tmp_path, *flags):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    folder = tmp_path / "seen"
    folder.mkdir()
    command = [sys.executable, str(script), f"--folder={folder}", *flags]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        assert process.poll() is None or "--code=3" in flags
        time.sleep(0.1)
    return process, folder


@needs_two_cores
def test_processes_share_the_cores_and_tell_who_speaks(tmp_path):
    process, folder = start(tmp_path)
    files = list(folder.iterdir())
    total = len(os.sched_getaffinity(0))
    assert sum(int(file.read_text()) for file in files) == total
    (folder / "go on").write_text("")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out == "all done\n"
    assert "[1] to stderr\n" in err and "[2] to stderr\n" in err


@pytest.mark.slow
@needs_two_cores
def test_sigterm_stops_all_and_a_failure_is_handed_on(tmp_path):
    process, _ = start(tmp_path)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "Stopped by SIGTERM, and all 2 processes have saved" in err
    assert err.count("parent.py: saved.") == 2

    (tmp_path / "again").mkdir()
    process, _ = start(tmp_path / "again", "--code=3")
    process.communicate(timeout=60)
    assert process.returncode == 3


def test_flags_without_effect_are_refused(call_program, tmp_path):
    members = ["-m", "experiments.cascade", "--members=a,b", f"--workdir={tmp_path / 'w'}"]
    run = ["-m", "experiments.filters", "--run=a", f"--workdir={tmp_path / 'w'}"]
    for arguments, flag in (
        (members, "seeds=3"),
        (members, "ray_cpus=2"),
        (run, "preset=quick"),
    ):
        done = call_program(*arguments, f"--{flag}")
        assert done.returncode == 2
        name = flag.partition("=")[0]
        assert f"trains nothing, so --{name} cannot stand beside it" in done.stderr
    assert not any(tmp_path.iterdir())

"""Runs by Ray: what is said without it, files of nodes elsewhere, a node that is killed."""

import io
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest
import rich.console
from run_outcome import outcome

from configs import digits_mlp
from cvjax import cli
from cvjax.errors import DivergedError, UserError, WorkdirInUse
from cvjax.storage import checkpoint, divergence, metrics_log, workdir
from cvjax.training import train_and_evaluate
from experiments import on_ray, ray_cluster, runner, runs_table, sharing

ROOT = pathlib.Path(__file__).parents[1]
COMMAND = ["x.py", "--seeds=2"]
SETTINGS = {"total_steps": 8, "log_every": 4, "eval_every": 4, "checkpoint_every": 4}


def small(**settings):
    config = digits_mlp.get_config()
    config.update({**SETTINGS, **settings})
    config.model.widths = (5,)
    return config


@pytest.fixture
def train(monkeypatch, tmp_path):
    """The task of a run in tmp_path/"driver"/"run", of a driver `x.py --seeds=2`."""
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(cli, "prepare", lambda: None)
    monkeypatch.setattr(on_ray.tempfile, "gettempdir", lambda: str(tmp_path / "node"))
    (tmp_path / "driver").mkdir()

    def train(mark, config=None):
        config = config or small().to_dict()
        return on_ray.train(config, str(tmp_path / "driver/run"), str(mark), COMMAND)

    return train


def test_without_ray_it_is_said_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"not installed: `pip install 'ray>=2\.50,<3'`"):
        runner.train_all({tmp_path / "a": small()}, shared=sharing.Sharing(ray="local"))
    assert not list(tmp_path.iterdir())


def test_two_ways_to_share_are_refused(monkeypatch):
    def given(**values):
        defaults = {"processes": 1, "ray": "local", "ray_cpus": 1, "ray_gpus": None}
        values = type("Values", (), defaults | values)
        monkeypatch.setattr(sharing.flags, "FLAGS", values)
        return sharing.from_flags()

    monkeypatch.setattr(sharing.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match="--ray_cpus is of no use without --ray"):
        given(ray="", ray_cpus=4)
    assert given(ray_gpus=0.25) == sharing.Sharing(ray="local", ray_gpus=0.25)
    with pytest.raises(UserError, match="--ray and --processes are two ways"):
        given(processes=2)
    with pytest.raises(UserError, match=r"fraction of a GPU or a whole number, got 1\.5"):
        given(ray_gpus=1.5)
    for address in ("auto", "10.0.0.1:6379", "[::1]:6379"):
        assert given(ray=address).ray == address
    for address in ("nope", "host:", ":1", "host:99999", "host:0", "ray://host:1"):
        with pytest.raises(UserError, match="HOST:PORT of a cluster, got"):
            given(ray=address)
    monkeypatch.setattr(sharing.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="package ray, which is not installed"):
        given()


def test_a_run_asks_for_no_more_than_a_node_has():
    class Ray:
        @staticmethod
        def nodes():
            cpu = {"Alive": True, "Resources": {"CPU": 4.0}}
            gpu = {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 8.0}}
            dead = {"Alive": False, "Resources": {"CPU": 64.0}}
            return [cpu, gpu, dead]

    assert ray_cluster.gpus_of_each(Ray, 2, None) == 1
    assert ray_cluster.gpus_of_each(Ray, 4, 0.0) == 0
    with pytest.raises(UserError, match="64 CPU cores and 0 GPUs"):
        ray_cluster.gpus_of_each(Ray, 64, 0.0)
    with pytest.raises(
        UserError, match=r"4 CPU cores and 1 GPUs, and no node .* 4 and 0, 2"
    ):
        ray_cluster.gpus_of_each(Ray, 4, None)


def test_a_node_that_sees_the_folder_trains_in_it(train, tmp_path):
    mark = tmp_path / "driver" / ".mark"
    mark.touch()
    assert train(mark) == on_ray.Outcome("finished")
    assert runner.is_finished(tmp_path / "driver/run")
    manifest = workdir.read_manifest(tmp_path / "driver/run")
    assert manifest["command"][-1] == "--seeds=2"


def test_files_of_a_node_elsewhere_come_back_whole(train, tmp_path):
    outcome = train(tmp_path / "driver" / ".mark")
    assert outcome.kind == "finished" and not list((tmp_path / "driver").iterdir())
    on_ray._write(tmp_path / "driver/run", outcome.files)
    (away,) = (tmp_path / "node").glob("*/run")
    for file in filter(pathlib.Path.is_file, away.rglob("*")):
        if file.name not in (".lock", ".holder"):
            name = file.relative_to(away)
            assert (tmp_path / "driver/run" / name).read_bytes() == file.read_bytes()
    assert checkpoint.latest_step(tmp_path / "driver/run") == 8
    # Longer, it goes on from there.
    train_and_evaluate(small(total_steps=12), tmp_path / "driver/run")
    rows = metrics_log.read_metrics(tmp_path / "driver/run/metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == [4, 8, 12]


def test_what_comes_back_replaces_that_an_earlier_try_diverged(tmp_path):
    divergence.write(tmp_path, DivergedError("nan", 3))
    on_ray._write(tmp_path, {"config.json": b"{}"})
    assert divergence.read(tmp_path) is None
    on_ray._write(tmp_path, {divergence.NAME: b'{"step": 1, "message": "nan"}'})
    assert divergence.read(tmp_path)["step"] == 1


def test_how_a_task_ends(train, tmp_path, monkeypatch):
    mark = tmp_path / "driver" / ".mark"
    mark.touch()
    monkeypatch.setattr(on_ray, "SECONDS_TO_DIE", 0)
    for error, kind in (
        (WorkdirInUse("in use"), "held"),
        (UserError("wrong"), "refused"),
        (DivergedError("nan"), "diverged"),
    ):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(on_ray, "train_and_evaluate", fail)
        assert train(mark) == on_ray.Outcome(kind, str(error))


def test_who_has_just_died_is_waited_for(train, tmp_path, monkeypatch):
    mark = tmp_path / "driver" / ".mark"
    mark.touch()
    attempts = []

    def in_use_twice(*_):
        attempts.append(1)
        if len(attempts) < 3:
            raise WorkdirInUse("in use")

    monkeypatch.setattr(on_ray, "train_and_evaluate", in_use_twice)
    monkeypatch.setattr(on_ray.time, "sleep", lambda seconds: None)
    assert train(mark).kind == "finished" and len(attempts) == 3


def test_the_table_shows_who_trains_and_how_far(tmp_path):
    started = time.time() - 10
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    (tmp_path / "a/.holder").write_text("process 7 on node3")
    (tmp_path / "b/.holder").write_text("process 8 on node4")
    os.utime(tmp_path / "b/.holder", (1, 1))  # of an earlier day
    rows = [{"step": step, "train/loss": 2 / step} for step in range(1, 2_001)]
    rows.insert(-1, {"step": 1_999, "val/error": 0.25})
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (tmp_path / "a/metrics.jsonl").write_text(text)
    config = small(total_steps=4_000)
    read = {
        tmp_path / name: runs_table.read(tmp_path / name, config, state, started)
        for name, state in {"c": "finished", "b": "waiting", "a": "waiting"}.items()
    }
    assert read[tmp_path / "a"] == ("process 7 on node3", 2_000, 4_000, 0.001, 0.25)
    assert read[tmp_path / "b"] == ("waiting", 0, 4_000, None, None)
    console = rich.console.Console(width=120, record=True, file=io.StringIO())
    console.print(runs_table.make_table(read))
    shown = console.export_text()
    assert "1 of 3 runs ended" in shown
    assert re.search(r"a +process 7 on node3 +2,000 of 4,000 +0.001 +25.0 %", shown)
    assert shown.index("process 7") < shown.index("waiting") < shown.index("finished")


# The SLURM script of docs/cluster.md

STAND_INS = {
    # A task on each of two nodes, as srun does.
    "srun": """
        echo "srun $1 $2 $3" >>"$LOG"
        while [ "$1" != bash ]; do shift; done
        SLURM_PROCID=0 "$@" & first=$!
        SLURM_PROCID=1 "$@" & second=$!
        trap 'kill $first $second; exit 143' TERM
        wait""",
    # A head that takes a second to answer.
    "ray": """
        if [ "$1" = status ]; then [ -e "$UP" ]; exit; fi
        echo "ray $* token=${#RAY_AUTH_TOKEN}" >>"$LOG"
        if [ "$2" = --head ]; then sleep 1; touch "$UP"; fi
        exec sleep 60""",
    "python": """
        [ "$1" = -c ] && exec python3 "$@"
        echo "python $*" >>"$LOG"
        trap 'sleep 1; echo saved >>"$LOG"; exit 75' TERM
        for i in $(seq "$SECONDS_OF_WORK"); do sleep 1; done
        exit $CODE_OF_WORK""",
    "scontrol": """
        echo "scontrol $*" >>$LOG""",
}


def start_job(tmp_path, seconds, code=0):
    (script,) = re.findall(
        r"^```bash\n(.*?)^```", (ROOT / "docs/cluster.md").read_text(), re.M | re.S
    )
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    (tmp_path / "bin").mkdir()
    for name, text in STAND_INS.items():
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/bash\n{textwrap.dedent(text)}\n")
        file.chmod(0o755)
    (tmp_path / "job.sh").write_text(script)
    subprocess.run(["bash", "-n", str(tmp_path / "job.sh")], check=True)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "LOG": str(tmp_path / "log"),
        "UP": str(tmp_path / "up"),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "20123",
        "SLURM_CPUS_PER_TASK": "16",
        "SECONDS_OF_WORK": str(seconds),
        "CODE_OF_WORK": str(code),
    }
    return subprocess.Popen(["bash", str(tmp_path / "job.sh")], env=environment)


def test_the_slurm_script_starts_ray_and_hands_on_the_exit_code(tmp_path):
    job = start_job(tmp_path, seconds=4, code=3)
    assert job.wait(timeout=30) == 3
    lines = (tmp_path / "log").read_text().splitlines()
    address = f"{socket.gethostname()}:20123"
    assert "--no-kill" in lines[0] and "--cpus-per-task=16" in lines[0]
    assert lines[1].startswith("ray start --head --port=20123 --num-cpus=16 ")
    assert lines[1].endswith("--block token=64")
    joined = f"ray start --address={address} --num-cpus=16 --block token=64"
    assert joined in lines[2:4]
    (work,) = [line for line in lines[2:] if line.startswith("python")]
    assert work.startswith("python -m experiments.sweep --config=configs/")
    assert work.endswith(f"--ray={address}")
    assert not any(line.startswith("scontrol") for line in lines)


def test_the_slurm_script_saves_at_sigterm_and_is_requeued(tmp_path):
    job = start_job(tmp_path, seconds=60)
    log = tmp_path / "log"
    wait_until(lambda: log.exists() and "python" in log.read_text(), job, 30)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 75
    assert log.read_text().splitlines()[-2:] == ["saved", "scontrol requeue 20123"]


# With Ray itself


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", r":1: Connection refused\)"),
        ("auto", r":1: Connection refused\)"),
        ("ray://a:1", r"an address is auto or HOST:PORT\)"),
        ("nowhere", r"Invalid address format: nowhere\)"),
    ],
)
def test_an_address_where_nobody_answers(address, reason, tmp_path, monkeypatch):
    """At once: Ray itself would try for minutes."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'cvjax[ray]'")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # which is what "auto" means
    with pytest.raises(
        UserError, match=f"--ray={address} reaches no Ray cluster .*{reason}"
    ):
        runner.train_all({tmp_path / "a": small()}, shared=sharing.Sharing(ray=address))
    assert not list(tmp_path.iterdir())


# As many threads as a task of --ray_cpus=1 has: sums are taken in their order.
ONE_CORE = {**os.environ, "NPROC": "1", "OMP_NUM_THREADS": "1"}


def command(folder, *flags, steps):
    return [
        *(sys.executable, "-m", "experiments.sweep", "--config=configs/digits_mlp.py"),
        *(f"--workdir={folder}", "--set=seed=0,1", f"--config.total_steps={steps}"),
        *("--config.checkpoint_every=50", "--config.log_every=10", *flags),
    ]


def wait_until(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def check_equal(folder, reference):
    """Bit for bit, but for what depends on the clock."""
    for seed in (0, 1):
        ours, theirs = (place / f"runs/seed={seed}" for place in (folder, reference))
        assert outcome(ours) == outcome(theirs)
        assert (ours / "inputs.npz").read_bytes() == (theirs / "inputs.npz").read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_killed_node_loses_only_what_came_after_the_checkpoint(tmp_path):
    """Two nodes with a run each; one dies, and the other takes its run over."""
    pytest.importorskip("ray", reason="needs Ray: pip install 'cvjax[ray]'")
    from ray.cluster_utils import Cluster

    steps, folder = 2_000, tmp_path / "ray"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1)
        process = subprocess.Popen(
            command(folder, f"--ray={cluster.address}", steps=steps),
            cwd=ROOT,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        places = [folder / f"runs/seed={seed}" for seed in (0, 1)]
        wait_until(lambda: all(map(checkpoint.latest_step, places)), process)
        cluster.remove_node(node, allow_graceful=False)
        saved = [checkpoint.latest_step(place) for place in places]
        assert max(saved) < steps
        _, log = process.communicate(timeout=300)
    finally:
        cluster.shutdown()
    print(log)
    assert process.returncode == 0, log
    starts = [
        sorted(int(file.name[-9:]) for file in (place / "tensorboard").iterdir())
        for place in places
    ]
    (taken,) = [index for index in (0, 1) if len(starts[index]) == 2]
    assert starts[1 - taken] == [0]
    assert starts[taken][1] >= saved[taken] - 50  # the first step after the checkpoint
    trained_by = re.findall(rf"seed={taken}: (process \d+)", log)
    assert len(set(trained_by)) == 2
    serial = command(tmp_path / "serial", steps=steps)
    subprocess.run(serial, cwd=ROOT, check=True, capture_output=True, env=ONE_CORE)
    check_equal(folder, tmp_path / "serial")


@pytest.mark.slow
def test_ctrl_c_saves_all_runs_and_the_same_line_goes_on(tmp_path):
    pytest.importorskip("ray", reason="needs Ray: pip install 'cvjax[ray]'")
    folder = tmp_path / "ray"
    line = command(folder, "--ray=local", steps=2_000)
    process = subprocess.Popen(
        line, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    log = folder / "runs/seed=0/metrics.jsonl"
    wait_until(lambda: log.exists() and log.stat().st_size, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, text = process.communicate(timeout=120)
    assert process.returncode == 75, text
    assert "Stopped by SIGINT, and what was trained is saved" in text
    step = int(re.search(r"Stopped by SIGINT and saved at step (\d+)", text)[1])
    assert checkpoint.latest_step(folder / "runs/seed=0") == step < 2_000
    for rest in (line, command(tmp_path / "serial", steps=2_000)):
        subprocess.run(rest, cwd=ROOT, check=True, capture_output=True, env=ONE_CORE)
    check_equal(folder, tmp_path / "serial")

"""Every program, given what its users give it: a sentence and exit code 2, nothing written.

The programs are imported once, in a process of their own, which forks for each line.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

DRIVER = """
import importlib, json, os, shutil, signal, sys, traceback
jobs = json.load(sys.stdin)
from cvjax import cli
modules = [job["module"] for job in jobs if not job["own_flags"]]
loaded = {name: importlib.import_module(name) for name in modules}
home = os.getcwd()
for job in jobs:
    os.mkdir("here")
    os.chdir("here")
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        for stream in (1, 2):
            os.dup2(write, stream)
        signal.alarm(job["seconds"])
        module = loaded.get(job["module"]) or importlib.import_module(job["module"])
        if hasattr(module, "define_flags"):
            module.define_flags()
        if job["module"] == "train":
            module.flags.mark_flags_as_required(["config", "workdir"])
        sys.argv = [job["module"], *job["arguments"]]
        try:
            cli.run(module.main)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(code)
    os.close(write)
    with os.fdopen(read, errors="replace") as pipe:
        text = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    left = os.listdir()
    os.chdir(home)
    shutil.rmtree("here")
    print(json.dumps({"code": code, "text": text, "left": left}), flush=True)
"""

# What is necessary besides the flag that is tried.
CONFIG = f"--config={ROOT / 'configs' / 'digits_mlp.py'}"
PROGRAMS = {
    "train": [CONFIG, "--workdir=w"],
    "cvjax.evaluate": ["--workdir=w"],
    "cvjax.predict": ["--workdir=w", "x.png"],
    "cvjax.interop.torch": ["x.npz", "--workdir=w", "--model=mlp"],
    "cvjax.export": ["--workdir=w", "--output=x"],
    "cvjax.compare": ["w"],
    "experiments.depth_degradation.__main__": ["--workdir=w"],
    "experiments.vanishing_gradients.__main__": ["--workdir=w"],
    "experiments.odenet_vs_resnet.__main__": ["--workdir=w"],
    "experiments.continuous_limit.__main__": ["--workdir=w"],
    "experiments.multilevel.__main__": ["--workdir=w"],
    "experiments.learning_rates.__main__": ["--workdir=w"],
    "experiments.augmentation.__main__": ["--workdir=w"],
    "experiments.filters.__main__": ["--workdir=w"],
    "experiments.complexity.__main__": [],
    "experiments.cascade.__main__": ["--workdir=w"],
}
AT_IMPORT = ("train", "experiments.complexity.__main__")  # define their flags there

PATH = ("", "gs://bucket/x", "s3:/x", "a\udcff", "x" * 300, "~nobody-at-all/x")
COUNT = ("", "0", "-1", "1.5", "nan", "1e9", "99999999999", "３", "many")
INDEX = tuple(text for text in COUNT if text != "0")
RATE = ("", "nan", "inf", "-inf", "-1", "1e39", "０.1", "fast")
CHOICE = ("", "nope", "None")
LIST = ("", ",", "x", "1.5", "-8", "8,8", "20,,32", "３", "9999999999999")
FIELDS = ("", "x", "=", "num_classes=5", "name=vgg", "depth=", "a-b=1", "depth=8,depth=8")

EXPERIMENT = {
    "workdir": PATH,
    "preset": CHOICE,
    "seeds": (*COUNT, "100000000"),
    "steps": COUNT,
}
TABLE = {
    "train": {
        "workdir": PATH,
        "config": ("", "nope.py", ".", "README.md", "run/config.json", "gs://x/y.py"),
        "profile": ("1", "1:0", "-1:2", "a:b", "３:1"),
        "coordinator_address": (":", "host", ":1", "host:", "host:x", "host:99999"),
        "process_count": ("", "nan", "99999999999", "2"),
        "process_index": ("", "nan", "99999999999", "2"),
        "config.seed": INDEX,
        "config.total_steps": COUNT,
        "config.log_every": COUNT,
        "config.eval_every": COUNT,
        "config.checkpoint_every": COUNT,
        "config.keep_checkpoints": COUNT,
        "config.steps_per_dispatch": INDEX[:-1],
        "config.train_eval_examples": ("-2", "nan", "99999999999", "３"),
        "config.init_from": PATH,
        "config.init_refine": COUNT,
        "config.data.name": ("", "nope", "../x", "digits:1", "a\udcff"),
        "config.data.data_dir": PATH,
        "config.data.cache_dir": PATH,
        "config.data.val_examples": ("0", "-2", "nan", "99999999999", "1797"),
        "config.data.train_examples": ("0", "-2", "nan", "99999999999"),
        "config.data.shrink": COUNT,
        "config.data.batch_size": COUNT,
        "config.data.batch-size": ("32",),
        "config.data.eval_batch_size": COUNT,
        "config.data.normalization": CHOICE,
        "config.data.crop_padding": INDEX,
        "config.data.brightness": (*RATE, "1"),
        "config.model.name": CHOICE,
        "config.model.widths": ("(0,)", "(-1,)", "(1.5,)", "(99999999999,)", "x"),
        "config.optim.name": CHOICE,
        "config.optim.learning_rate": (*RATE, "0"),
        "config.optim.momentum": (*RATE, "1"),
        "config.optim.weight_decay": (*RATE, "1e300"),
        "config.optim.schedule": CHOICE,
        "config.optim.boundaries": ("(0,)", "(1.5,)", "(nan,)", "(0.5,0.5)", "x"),
        "config.optim.decay_factor": RATE,
        "config.optim.warmup_steps": INDEX,
        "config.optim.freeze": ("(", "[", "nowhere"),
        "config.loss.label_smoothing": (*RATE, "1"),
        "config.nope": ("1",),
        "config.seed.x": ("1",),
        "config.optim.learning_rat": ("1",),
        "nope": ("1",),
    },
    "cvjax.evaluate": {
        "workdir": PATH,
        "output": PATH,
        "split": CHOICE,
        "crops": (*CHOICE, "2"),
        "scales": LIST,
        "batch_size": COUNT,
        "fields": FIELDS,
        "checkpoint": CHOICE,
        "data_dir": PATH[1:],
        "cache_dir": PATH[1:],
    },
    "cvjax.predict": {"workdir": PATH, "top": COUNT, "checkpoint": CHOICE},
    "cvjax.interop.torch": {
        "workdir": PATH,
        "export": (*PATH[1:], "x.pth"),
        "model": CHOICE,
        "fields": FIELDS,
        "mean": LIST,
        "std": LIST,
        "normalization": CHOICE,
        "num_classes": COUNT,
        "image_size": COUNT,
        "class_names": PATH[1:],
    },
    "cvjax.export": {
        "workdir": PATH,
        "output": PATH,
        "checkpoint": CHOICE,
        "batch_size": INDEX,
        "platforms": ("", ",", "abacus"),
    },
    "cvjax.compare": {"metric": CHOICE, "output": PATH, "html": PATH},
    "experiments.depth_degradation.__main__": {
        **EXPERIMENT,
        "depths": (*LIST, "9", "1000000"),
        "nets": CHOICE,
        "first_seed": INDEX,
        "processes": COUNT[:-1],
        "gather": ("", ",", "gs://x", "nowhere"),
    },
    "experiments.vanishing_gradients.__main__": {**EXPERIMENT, "depths": LIST},
    "experiments.odenet_vs_resnet.__main__": {**EXPERIMENT, "row": CHOICE, "rounds": COUNT},
    "experiments.continuous_limit.__main__": EXPERIMENT,
    "experiments.multilevel.__main__": EXPERIMENT,
    "experiments.learning_rates.__main__": {
        **EXPERIMENT,
        "config": ("", "nope.py"),
        "range_steps": COUNT,
        "lowest": (*RATE, "0", "100"),
        "highest": (*RATE, "0"),
    },
    "experiments.augmentation.__main__": EXPERIMENT,
    "experiments.filters.__main__": {
        "workdir": PATH,
        "run": (*PATH, "nowhere"),
        "preset": CHOICE,
        "fields": FIELDS,
        "channels": COUNT,
        "images": COUNT,
        "rule": CHOICE,
        "data_dir": PATH[1:],
    },
    "experiments.complexity.__main__": {
        "workdir": PATH,
        "model": CHOICE,
        "models": ("", ",", "nope"),
        "image_size": COUNT,
        "num_classes": COUNT,
        "fields": FIELDS[:-1],
        "preset": CHOICE,
    },
    "experiments.cascade.__main__": {
        **EXPERIMENT,
        "members": ("", ",", "a@0", "a@x", "a@３,b", "gs://x,b", "nowhere,nothing"),
        "measure": CHOICE,
        "tolerance": RATE,
        "target_accuracy": (*RATE, "0", "2"),
        "target_cost": (*RATE, "0", "2"),
        "batch_size": COUNT,
    },
}
CASES = [
    (program, f"--{flag}={value}")
    for program, flags in TABLE.items()
    for flag, values in flags.items()
    for value in values
]
# The first of each flag by default, all of them with -m slow.
FEW = [case for n, case in enumerate(CASES) if n % 3 == 0]


def call(cases, folder):
    jobs = [
        {
            "module": program,
            "own_flags": program in AT_IMPORT,
            "arguments": [*PROGRAMS[program], flag],
            "seconds": 60,
        }
        for program, flag in cases
    ]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(jobs), done.stderr
    return answers


def check(cases, folder):
    flaws = []
    for (program, flag), answer in zip(cases, call(cases, folder), strict=True):
        lines = answer["text"].strip().splitlines()
        if answer["code"] != 2 or len(lines) > 5 or "Traceback" in answer["text"]:
            flaws.append((program, flag, answer["code"], lines[-3:]))
        if answer["left"]:
            flaws.append((program, flag, "left", answer["left"]))
    assert not flaws, "\n".join(map(repr, flaws))


def test_hostile_values(tmp_path):
    check(FEW, tmp_path)


@pytest.mark.slow
def test_all_hostile_values(tmp_path):
    check(CASES, tmp_path)


@pytest.mark.parametrize(
    ("program", "flag"), [("train", "--workdir"), ("cvjax.evaluate", "--scales")]
)
def test_a_flag_without_its_value(program, flag, tmp_path):
    check([(program, flag)], tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "arguments"),
    [
        ("XDG_CACHE_HOME", "~nobody-at-all/x", PROGRAMS["train"]),
        (
            *("TFDS_DATA_DIR", "~nobody-at-all/x"),
            [*PROGRAMS["train"], "--config.data.name=cifar10"],
        ),
        ("JAX_PLATFORMS", "foo", PROGRAMS["train"]),
    ],
)
def test_variables_that_mean_nothing(name, value, arguments, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *arguments],
        cwd=tmp_path,
        env={"JAX_PLATFORMS": "cpu", **os.environ, "PYTHONPATH": str(ROOT), name: value},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert name in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_figures_need_no_backend_of_the_user(tmp_path):
    code = "from cvjax import cli; cli.prepare(); import matplotlib.figure"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "foo"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

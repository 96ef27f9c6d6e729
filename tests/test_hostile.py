"""Every program, given what its users give it: a sentence, exit code 2, nothing written."""

import itertools
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# What is necessary besides the flag that is tried.
CONFIG = f"--config={ROOT / 'configs' / 'digits_mlp.py'}"
PROGRAMS = {
    "train": [CONFIG, "--workdir=w"],
    "cvjax.evaluate": ["--workdir=w"],
    "cvjax.predict": ["--workdir=w", "x.png"],
    "cvjax.interop.torch": ["x.npz", "--workdir=w", "--model=mlp"],
    "cvjax.export": ["--workdir=w", "--output=x"],
    "cvjax.compare": ["w"],
    "experiments.depth_degradation": ["--workdir=w"],
    "experiments.vanishing_gradients": ["--workdir=w"],
    "experiments.odenet_vs_resnet": ["--workdir=w"],
    "experiments.continuous_limit": ["--workdir=w"],
    "experiments.multilevel": ["--workdir=w"],
    "experiments.learning_rates": ["--workdir=w"],
    "experiments.augmentation": ["--workdir=w"],
    "experiments.filters": ["--workdir=w"],
    "experiments.complexity": [],
    "experiments.depth_scaling": ["--workdir=w"],
    "experiments.detection": ["--workdir=w"],
    "experiments.segmentation": ["--workdir=w"],
    "experiments.depth_degradation.rates": ["--workdir=w"],
    "experiments.depth_degradation.trained_blocks": ["--workdir=w", "nowhere"],
    "experiments.odenet_vs_resnet.robustness": ["--workdir=w", "nowhere"],
    "experiments.odenet_vs_resnet.solves": ["--workdir=w", "nowhere"],
    "experiments.sweep": [CONFIG, "--workdir=w", "--set=seed=0,1"],
    "experiments.cascade": ["--workdir=w"],
}
PATH = ("", "gs://bucket/x", "s3:/x", "a\udcff", "x" * 300, "~nobody-at-all/x")
COUNT = ("", "0", "-1", "1.5", "nan", "1e9", "99999999999", "３", "many")
INDEX = tuple(text for text in COUNT if text != "0")
RATE = ("", "nan", "inf", "-inf", "-1", "1e39", "０.1", "fast")
CHOICE = ("", "nope", "None")
LIST = ("", ",", "x", "1.5", "-8", "8,8", "20,,32", "３", "9999999999999")
FIELDS = ("", "x", "=", "num_classes=5", "name=vgg", "depth=", "a-b=1", "depth=8,depth=8")

SHARED = {
    "processes": INDEX,
    "ray": ("", "nope", "host:", ":1", "host:99999999"),
    "ray_cpus": COUNT,
    "ray_gpus": RATE,
}
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
    "cvjax.predict": {
        "workdir": PATH,
        "top": COUNT,
        "checkpoint": CHOICE,
        "threshold": (*RATE, "1.5"),
        "output": PATH,
        "pretrained": (*CHOICE, "../x"),
    },
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
        "resize": COUNT,
        "dataset": CHOICE,
        "data_dir": PATH[1:],
    },
    "cvjax.export": {
        "workdir": PATH,
        "output": PATH,
        "checkpoint": CHOICE,
        "batch_size": INDEX,
        "platforms": ("", ",", "abacus"),
        "pretrained": (*CHOICE, "../x"),
    },
    "cvjax.compare": {
        "metric": CHOICE,
        "output": PATH,
        "html": PATH,
        "by": ("", "nope"),
        "baseline": ("", "nope"),
    },
    "experiments.depth_degradation": {
        **EXPERIMENT,
        **SHARED,
        "depths": (*LIST, "9", "1000000"),
        "nets": CHOICE,
        "first_seed": INDEX,
        "gather": ("", ",", "gs://x", "nowhere"),
    },
    "experiments.vanishing_gradients": {**EXPERIMENT, "depths": LIST},
    "experiments.odenet_vs_resnet": {**EXPERIMENT, "row": CHOICE, "rounds": COUNT},
    "experiments.continuous_limit": EXPERIMENT,
    "experiments.multilevel": EXPERIMENT,
    "experiments.learning_rates": {
        **EXPERIMENT,
        "config": ("", "nope.py"),
        "range_steps": COUNT,
        "lowest": (*RATE, "0", "100"),
        "highest": (*RATE, "0"),
    },
    "experiments.augmentation": EXPERIMENT,
    "experiments.filters": {
        "workdir": PATH,
        "run": (*PATH, "nowhere"),
        "preset": CHOICE,
        "fields": FIELDS,
        "channels": COUNT,
        "images": COUNT,
        "rule": CHOICE,
        "data_dir": PATH[1:],
    },
    "experiments.complexity": {
        "workdir": PATH,
        "model": CHOICE,
        "models": ("", ",", "nope"),
        "image_size": COUNT,
        "num_classes": COUNT,
        "fields": FIELDS[:-1],
        "preset": CHOICE,
    },
    "experiments.depth_scaling": EXPERIMENT,
    "experiments.detection": {**EXPERIMENT, "data_dir": PATH},
    "experiments.segmentation": {**EXPERIMENT, "data_dir": PATH},
    "experiments.depth_degradation.rates": EXPERIMENT,
    "experiments.depth_degradation.trained_blocks": {
        "workdir": PATH,
        "checkpoint": CHOICE,
        "examples": COUNT,
    },
    "experiments.odenet_vs_resnet.robustness": {
        "workdir": PATH,
        "baseline": ("",),
        "examples": COUNT,
    },
    "experiments.odenet_vs_resnet.solves": {"workdir": PATH, "rounds": COUNT},
    "experiments.sweep": {
        **SHARED,
        "workdir": PATH,
        "config": ("", "nope.py"),
        "set": ("", "seed", "seed=", "=1", "nope=1,2", "seed=0:9", "seed=many,1"),
        "random": ("-1", "nan", "many", "99999999"),
        "metric": CHOICE,
        "config.seed": ("-1", "many"),
    },
    "experiments.cascade": {
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
# One value of each flag by default, another from flag to flag; all of them with -m slow.
FLAGS = itertools.groupby(CASES, lambda case: (case[0], case[1].partition("=")[0]))
FEW = [
    values[number % len(values)]
    for number, values in enumerate(list(cases) for _, cases in FLAGS)
]


@pytest.fixture
def check(call_program, tmp_path):
    """Gives each program its flag; it has to refuse that, and write nothing."""

    def check(cases):
        flaws = []
        for number, (program, flag) in enumerate(cases):
            folder = tmp_path / str(number)
            folder.mkdir()
            name = [ROOT / "train.py"] if program == "train" else ["-m", program]
            arguments = [*name, *PROGRAMS[program], flag]
            done = call_program(*arguments, cwd=folder, seconds=60)
            text = done.stdout + done.stderr
            lines = text.strip().splitlines()
            if done.returncode != 2 or len(lines) > 5 or "Traceback" in text:
                flaws.append((program, flag, done.returncode, lines[-3:]))
            if left := os.listdir(folder):
                flaws.append((program, flag, "left", left))
        assert not flaws, "\n".join(map(repr, flaws))

    return check


def test_hostile_values(check):
    check(FEW)


@pytest.mark.slow
def test_all_hostile_values(check):
    check(CASES)


@pytest.mark.parametrize(
    ("program", "flag"), [("train", "--workdir"), ("cvjax.evaluate", "--scales")]
)
def test_a_flag_without_its_value(program, flag, check):
    check([(program, flag)])


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

"""The benchmarks, small: PyTorch's twins have our function, the sums are right, all run."""

import itertools
import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from benchmarks import batch_sources, data, memory, nets, report, train_step
from benchmarks import compile as compile_benchmark
from cvjax import timing
from cvjax.data.dataset import ArraySplit
from cvjax.errors import UserError
from cvjax.interop import torch as interop
from cvjax.models import create_model

try:
    import torch
except ModuleNotFoundError:
    torch = None
else:
    from benchmarks import torch_nets

ROOT = pathlib.Path(__file__).parents[1]
needs_torch = pytest.mark.skipif(torch is None, reason="needs PyTorch: pip install torch")


def run(name, *flags):
    command = [sys.executable, "-m", f"benchmarks.{name}", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


# Times


def test_functions_are_interleaved_and_warm_up_does_not_count():
    called = []
    functions = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = timing.interleave(functions, 3, warm_up=2)
    assert called == ["a", "b"] * 5
    assert {name: own.shape for name, own in seconds.items()} == {"a": (3,), "b": (3,)}


def test_spread_by_hand():
    spread = timing.spread(np.array([1.0, 2.0, 3.0, 4.0, 50.0]))
    assert spread == {"median": 3.0, "quartile_1": 2.0, "quartile_3": 4.0, "n": 5}
    assert timing.format_spread(spread, 1) == "3.0 (2.0 to 4.0)"


def test_shares_of_the_peak_by_hand():
    # The machine halves its speed in the second round: ratios and shares do not see it.
    slow = np.array([1.0, 2.0])
    times = {"cvjax": slow, "PyTorch": 0.5 * slow}
    times |= {"product, JAX": 0.1 * slow, "product, PyTorch": 0.2 * slow}
    summary = train_step.summarize(times, ["cvjax", "PyTorch"], 8, 500, matrix=10)
    assert summary["peak_by"] == "product, JAX"
    assert summary["peak_flops"]["quartile_3"] == pytest.approx(2000 / 0.1 * 0.875)
    ours, theirs = summary["sides"]["cvjax"], summary["sides"]["PyTorch"]
    assert ours["speed"]["median"] == ours["speed"]["quartile_1"] == 0.5
    assert ours["images_per_second"]["median"] == 6.0
    assert ours["of_peak"]["median"] == pytest.approx(1000 / 20_000)
    assert theirs["of_peak"]["median"] == pytest.approx(2 * 1000 / 20_000)


def test_highest_allocation():
    assert memory.highest([(3, -5), (1, 4), (2, 5), (4, 2)]) == 9
    assert memory.highest([]) == 0


def test_memory_saved_is_told_beside_the_same_net():
    def row(depth, side, recompute, beyond):
        sizes = {"state": 1_000_000, "beyond": beyond}
        return {
            "batch_size": 8,
            "depth": depth,
            "side": side,
            "recompute": recompute,
            **sizes,
        }

    rows = [row(20, "cvjax", False, 8_000_000), row(20, "cvjax", True, 2_000_000)]
    rows += [row(20, "PyTorch", False, 4_000_000), row(20, "PyTorch", True, 3_000_000)]
    assert [line[2:] for line in memory.tabulate(rows)] == [
        ("cvjax", "1.0", "8.0", ""),
        ("cvjax, remat", "1.0", "2.0", "75%"),
        ("PyTorch", "1.0", "4.0", ""),
        ("PyTorch, checkpoint", "1.0", "3.0", "25%"),
    ]


def test_unknown_net():
    with pytest.raises(
        UserError, match=r"--net must be one of .*, got 'ResNet-21'; did you"
    ):
        nets.choose(["ResNet-21"])


def test_torch_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError) as caught:
        report.import_torch()
    assert str(caught.value) == "torch is missing; `pip install torch`."


# Networks: small ones of every form

TWINS = {
    "cifar": ("resnet_cifar", {"depth": 14, "width": 4}, 8),
    "basic, small": ("resnet", {"depth": 18, "width": 4, "stem": "small"}, 8),
    "bottleneck": ("resnet", {"depth": 50, "width": 4}, 32),
    "vgg": ("vgg", {"depth": 11, "width": 4, **nets.SMALL_VGG}, 32),
}


def twin_of(case):
    """A net, its twin with random averages, and our variables from the twin's."""
    name, fields, side = TWINS[case]
    model = create_model(name, 10, **fields)
    torch.manual_seed(0)
    twin = torch_nets.create(model)
    for leaf_name, leaf in twin.state_dict().items():
        if leaf_name.endswith("running_mean"):
            leaf.normal_(0, 0.3)
        elif leaf_name.endswith("running_var"):
            leaf.uniform_(0.5, 1.5)
    tensors = {
        key: leaf.numpy().copy()
        for key, leaf in twin.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    return model, twin, interop.convert(tensors, model, (side, side, 3))


@needs_torch
@pytest.mark.parametrize("case", TWINS)
def test_twins_have_the_same_function(case):
    model, twin, variables = twin_of(case)
    side = TWINS[case][2]
    images = np.random.default_rng(0).normal(size=(3, side, side, 3)).astype(np.float32)
    jitted = jax.jit(
        lambda variables, images: model.apply(variables, images, train=False),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    with torch.no_grad():
        theirs = twin.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    ours = jitted(variables, images)
    assert np.abs(ours).max() > 0.1
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4, rtol=1e-4)


@needs_torch
def test_recomputing_changes_no_gradient_of_a_twin():
    _, twin, _ = twin_of("cifar")
    images = torch.randn(4, 3, 8, 8)

    def gradients(recompute):
        twin.recompute = recompute
        twin.zero_grad()
        (twin.train()(images) ** 2).sum().backward()
        return [leaf.grad.clone() for leaf in twin.parameters()]

    for kept, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(kept, again)


@needs_torch
def test_batches_are_cropped_and_flipped_as_one():
    """Each image is one of the 81 windows of its padded self, or such a one mirrored."""
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(256, size=(16, 5, 6, 3), dtype=np.uint8)
    mean = torch.full((5, 6, 3), 0.25)
    changed = torch_nets.augment(torch.from_numpy(images), mean, padding=4)
    assert changed.shape == (16, 3, 5, 6)
    assert changed.is_contiguous(memory_format=torch.channels_last)
    plain = images.astype(np.float32) / 255 - 0.25
    padded = np.pad(plain, ((0, 0), (4, 4), (4, 4), (0, 0)))
    windows = set()
    for own, seen in zip(padded, changed.numpy().transpose(0, 2, 3, 1), strict=True):
        (match,) = [
            (i, j, flip)
            for i in range(9)
            for j in range(9)
            for flip in (1, -1)
            if np.allclose(own[i : i + 5, j : j + 6][:, ::flip], seen, atol=1e-6)
        ]
        windows.add(match)
    assert len(windows) > 10 and {flip for *_, flip in windows} == {1, -1}


@needs_torch
@pytest.mark.slow
def test_two_steps_of_both_sides_are_equal():
    """Same weights, no augmentation: loss falls alike, parameters stay together."""
    import dataclasses

    from cvjax.data.augment import Augmentation
    from cvjax.data.normalize import Statistics
    from cvjax.training import steps
    from cvjax.training.state import create_train_state

    model, twin, variables = twin_of("cifar")
    net = nets.Net("resnet_cifar", TWINS["cifar"][1], 8)
    batch = nets.random_batch(net, 16)
    plain = Augmentation(crop_padding=0, flip=False)
    recipe = dataclasses.replace(nets.create_recipe(model), augmentation=plain)
    state = create_train_state(jax.random.key(0), recipe=recipe, image_shape=(8, 8, 3))
    before = jax.tree.map(np.array, variables["params"])  # the step gives its state up
    state = state.replace(**variables)
    mean = batch["image"].mean(axis=0, dtype=np.float32) / 255
    constants = steps.Constants(jax.random.key(0), Statistics(mean, np.ones_like(mean)))

    images = torch.from_numpy(batch["image"])
    x = (images.float() / 255 - torch.from_numpy(mean)).permute(0, 3, 1, 2)
    optimizer = torch_nets.create_optimizer(twin)
    for _ in range(2):
        state = steps.train_step(state, batch, constants, recipe=recipe)
        optimizer.zero_grad()
        logits = twin.train()(x)
        labels = torch.from_numpy(batch["label"]).long()
        torch.nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()
    tensors = {
        key: leaf.numpy()
        for key, leaf in twin.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    theirs = interop.convert(tensors, model, (8, 8, 3))["params"]
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, theirs)
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, theirs)
    assert max(jax.tree.leaves(apart)) < 0.01 * max(jax.tree.leaves(moved))


# Data


def random_split(count=40):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(count, 8, 8, 3), dtype=np.uint8)
    return ArraySplit(images, np.arange(count, dtype=np.int32))


def test_sources_give_every_image_once_an_epoch():
    sources, missing = batch_sources.create(random_split(), 8, workers=[0])
    names = {"cvjax, host", "cvjax, augmented"}
    if torch is not None:
        names |= {"PyTorch, batch", "PyTorch, DataLoader, 0 workers"}
    assert names <= set(sources) and set(missing) <= {"PyTorch", "tf.data"}
    for name in names:
        seen = []
        for _ in range(5):
            batch = next(sources[name])
            images, labels = batch.values() if isinstance(batch, dict) else batch
            assert sorted(images.shape[1:]) == [3, 8, 8]
            seen.extend(np.asarray(labels).tolist())
        assert sorted(seen) == list(range(40)), name


@needs_torch
def test_pictures_are_windows_of_the_padded_image():
    """By PIL, one by one: the same 162 possibilities as on the device."""
    torch.manual_seed(0)
    pictures = batch_sources.Pictures(random_split(12))
    padded = np.pad(pictures.images / 255, ((0, 0), (4, 4), (4, 4), (0, 0)))
    flips = []
    for index in range(12):
        seen, label = pictures[index]
        assert label == index
        seen = seen.numpy().transpose(1, 2, 0) + pictures.mean.transpose(1, 2, 0)
        (flip,) = [
            flip
            for i in range(9)
            for j in range(9)
            for flip in (1, -1)
            if np.allclose(padded[index, i : i + 8, j : j + 8][:, ::flip], seen, atol=1e-6)
        ]
        flips.append(flip)
    assert set(flips) == {1, -1}


def test_a_measured_program_that_fails():
    with pytest.raises(UserError, match=r"a measured program failed: .*no such thing"):
        data.run_python("-c", "raise SystemExit('no such thing')")


def test_a_rate_of_every_source(monkeypatch):
    sources = {side: itertools.count() for side in ("ours", "theirs")}
    absent = {"others": "not installed"}
    monkeypatch.setattr(batch_sources, "create", lambda *_: (sources, absent))
    flags = {"name": "digits", "batch_size": 8, "workers": [], "batches": 3, "rounds": 2}
    rows, missing = data.measure_rate(types.SimpleNamespace(**flags))
    assert [row["what"] for row in rows] == list(sources) and missing == absent
    assert all(row["spread"]["median"] > 0 for row in rows)
    assert all(next(batches) >= 2 * 3 for batches in sources.values())


# Whole benchmarks


@needs_torch
@pytest.mark.slow
def test_train_step(tmp_path):
    flags = ["--net=ResNet-14, 8 px", "--batch_size=4", "--rounds=2", "--matrix=64"]
    done = run("train_step", f"--workdir={tmp_path}", "--notorch_compile", *flags)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    # 2 of the 3 parts of the stem's work, 3 of all other: by the formula, at 8x8, width 8.
    stem, pixels = 64 * 27 * 8, (64, 16, 4)
    stages = sum(
        side * 9 * (before * features + 3 * features * features)
        for side, before, features in zip(pixels, (8, 8, 16), (8, 16, 32), strict=True)
    )
    assert row["macs_per_step"] == 4 * (2 * stem + 3 * (stages + 32 * 10))
    assert row["sides"]["PyTorch"]["speed"]["median"] == 1
    ours = {train_step.OURS, train_step.ROLLED, train_step.BY_XLA}
    assert set(row["sides"]) == {*ours, train_step.EAGER}
    assert "ResNet-14, 8 px" in (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_compile(tmp_path):
    flags = ["--depth=8", "--loop=rolled", "--batch_size=2", "--image_size=8", "--rounds=1"]
    done = run("compile", f"--workdir={tmp_path}", *flags)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["cached"]["compile"]["median"] < row["cold"]["compile"]["median"]


def test_compile_table():
    run_of = {"trace": 1.0, "compile": 2.0}
    summary = compile_benchmark.summarize([{"cold": run_of, "cached": run_of}] * 3)
    (line,) = compile_benchmark.tabulate([{"depth": 20, "loop": "rolled", **summary}])
    assert line[:4] == ("20", "rolled", "1.0 (1.0 to 1.0)", "2.0 (2.0 to 2.0)")


@needs_torch
@pytest.mark.slow
def test_memory(tmp_path):
    flags = ["--depth=8", "--depth=20", "--batch_size=16", "--image_size=8"]
    done = run("memory", f"--workdir={tmp_path}", *flags)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    beyond = {(row["side"], row["depth"], row["recompute"]): row["beyond"] for row in rows}
    for side in ("cvjax", "PyTorch"):
        kept, again = (beyond[side, 20, recompute] for recompute in (False, True))
        assert again < 0.8 * kept
        assert beyond[side, 8, False] < 0.7 * kept


@pytest.mark.slow
def test_data(tmp_path):
    flags = ["--name=digits", "--config=configs/digits_resnet.py", "--workers=0"]
    flags += ["--batches=2", "--rounds=1", "--starts=1"]
    done = run("data", f"--workdir={tmp_path}", *flags)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    steps = {row["what"]: row["spread"]["median"] for row in rows}
    assert steps["full caches"] < steps["blank caches"]
    assert {row["part"] for row in rows} == set(data.PARTS)


@pytest.mark.slow
def test_scaling(tmp_path):
    done = run("scaling", f"--workdir={tmp_path}", "--batch_size=8", "--rounds=2")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["devices"] for row in rows] == [1, 2, 4, 8]
    assert rows[0]["difference"] == 0
    assert all(0 < row["difference"] < 1e-4 for row in rows[1:])


@pytest.mark.slow
def test_seeds(tmp_path):
    flags = ["--net=ResNet-14, 8 px", "--batch_size=4", "--rounds=2", "--steps=1"]
    done = run("seeds", f"--workdir={tmp_path}", *flags)
    assert done.returncode == 0, done.stderr
    ways = json.loads((tmp_path / "results.json").read_text())["ways"]
    assert set(ways) == {"one after the other", "vmap", "processes"}
    assert ways["one after the other"]["speed"]["median"] == 1

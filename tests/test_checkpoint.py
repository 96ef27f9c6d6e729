"""Checkpoints come back bit for bit, or are refused; nothing in between."""

import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest
from flax import struct
from jax import numpy as jnp

from cvjax import errors
from cvjax.storage import array_files, checkpoint
from cvjax.storage.array_files import digest

REPOSITORY = pathlib.Path(__file__).parents[1]


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    batch_stats: dict
    opt_state: optax.OptState


def create_state(step=0, width=4):
    """A small state of all kinds of leaves; each step has other numbers."""
    rng = np.random.default_rng(step)
    params = {
        "stem": {"kernel": jnp.asarray(rng.normal(size=(3, 3, 1, width)), jnp.float32)},
        "head": {"bias": jnp.asarray(rng.normal(size=3), jnp.bfloat16)},
    }
    schedule = optax.piecewise_constant_schedule(0.1, {10: 0.1})
    tx = optax.chain(
        optax.add_decayed_weights(1e-4),
        optax.masked(optax.sgd(schedule, momentum=0.9), {"stem": True, "head": False}),
    )
    gradients = jax.tree.map(lambda x: x * 0.1, params)
    _, opt_state = tx.update(gradients, tx.init(params), params)
    mean = jnp.asarray(rng.normal(size=width), jnp.float32).at[0].set(jnp.nan)
    batch_stats = {"bn": {"mean": mean, "var": jnp.full(width, -0.0)}}
    return State(jnp.int32(step), params, batch_stats, opt_state)


def abstract(state):
    return jax.eval_shape(lambda: state)


def parts(state):
    """What a network predicts with."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def abstract_parts(state):
    return abstract(parts(state))


def assert_same(state, expected):
    """Equal in the types of all nodes and in the bytes of all leaves."""
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for leaf, wanted in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert isinstance(leaf, jax.Array)
        assert (leaf.dtype, leaf.shape) == (wanted.dtype, wanted.shape)
        assert np.asarray(leaf).tobytes() == np.asarray(wanted).tobytes()


def save_steps(workdir, steps, **info):
    for step in steps:
        checkpoint.save(workdir, step, create_state(step), info)


def test_what_is_saved_comes_back(tmp_path):
    state = create_state(7)
    best = {"step": 7, "val/error": 0.1 + 0.2}
    checkpoint.save(tmp_path, 7, state, {"best": best, "layers": {10: "a", 2: "b"}})
    restored, info = checkpoint.restore_latest(tmp_path, abstract(state))
    assert_same(restored, state)
    assert info["best"] == best
    assert info["step"] == 7
    assert info["layers"] == {"10": "a", "2": "b"}
    assert info["structure"]["params/stem/kernel"] == "float32[3,3,1,4]"
    assert info["structure"]["params/head/bias"] == "bfloat16[3]"
    assert info["structure"]["step"] == "int32[]"


def test_restored_arrays_can_be_donated(tmp_path):
    state = create_state(1)
    checkpoint.save(tmp_path, 1, state, {})
    restored, _ = checkpoint.restore_latest(tmp_path, abstract(state))
    donate = jax.jit(lambda s: jax.tree.map(lambda x: x + x, s), donate_argnums=0)
    assert_same(donate(restored), jax.tree.map(lambda x: x + x, state))


def test_nothing_saved_is_none(tmp_path):
    assert checkpoint.restore_latest(tmp_path, abstract(create_state())) is None
    assert checkpoint.latest_step(tmp_path) is None
    assert checkpoint.list_steps(tmp_path / "absent") == []


def test_digest_sees_names_dtypes_shapes_and_bits():
    x = np.zeros(4, np.float32)
    trees = [
        {"a": x},
        {"b": x},
        {"a": x.astype(np.int32)},
        {"a": x.reshape(2, 2)},
        {"a": -x},
        {"a": x, "b": x},
    ]
    assert len({digest(tree) for tree in trees}) == len(trees)
    assert digest({"a": jnp.zeros(4)}) == digest({"a": x})


# Damage


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, os.remove])
def test_damage_to_any_file_falls_back(tmp_path, caplog, capfd, damage):
    save_steps(tmp_path, [1, 2])
    target = abstract(create_state())
    folder = tmp_path / "checkpoints" / "2"
    good = tmp_path / "good"
    shutil.copytree(folder, good)
    files = [p.relative_to(good) for p in good.rglob("*") if p.is_file()]
    assert len(files) >= 8
    for count, file in enumerate(files):
        caplog.clear()
        damage(folder / file)
        state, info = checkpoint.restore_latest(tmp_path, target)
        assert (file, info["step"]) == (file, 1)
        assert_same(state, create_state(1))
        (notice,) = caplog.messages
        assert f"{folder} is damaged ({file} " in notice and "step 1 is taken" in notice
        # It was moved, not deleted, and its step can be saved again.
        moved = tmp_path / "damaged" / (f"2.{count}" if count else "2")
        assert moved.is_dir() and f"moved to {moved}, " in notice
        shutil.copytree(good, folder)
        assert checkpoint.restore_latest(tmp_path, target)[1]["step"] == 2
    assert capfd.readouterr() == ("", "")


def test_an_emptied_folder_falls_back(tmp_path, caplog):
    save_steps(tmp_path, [1, 2])
    folder = tmp_path / "checkpoints" / "2"
    shutil.rmtree(folder)
    folder.mkdir()
    _, info = checkpoint.restore_latest(tmp_path, abstract(create_state()))
    assert info["step"] == 1
    assert "info.json cannot be read" in caplog.text


def test_all_damaged_is_an_error_and_moves_nothing(tmp_path):
    save_steps(tmp_path, [1, 2])
    for step in "12":
        flip(tmp_path / "checkpoints" / step / "info.json")
    for _ in range(2):
        with pytest.raises(errors.UserError, match="steps 1, 2") as caught:
            checkpoint.restore_latest(tmp_path, abstract(create_state()))
        assert str(tmp_path / "checkpoints") in str(caught.value)
    assert checkpoint.list_steps(tmp_path) == [1, 2]


def test_a_reader_moves_nothing(tmp_path, caplog):
    save_steps(tmp_path, [1, 2])
    flip(tmp_path / "checkpoints" / "2" / "info.json")
    target = abstract(create_state())
    _, info = checkpoint.restore_latest(tmp_path, target, set_aside=False)
    assert info["step"] == 1
    assert "skipped" in caplog.text
    assert checkpoint.list_steps(tmp_path) == [1, 2]


def test_the_newest_info_is_read_without_its_arrays(tmp_path):
    assert checkpoint.read_latest_info(tmp_path) is None
    save_steps(tmp_path, [1, 2], best={"step": 1})
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "state")
    assert checkpoint.read_latest_info(tmp_path)["step"] == 2
    flip(tmp_path / "checkpoints" / "2" / "info.json")
    info = checkpoint.read_latest_info(tmp_path)
    assert (info["step"], info["best"]) == (1, {"step": 1})


@pytest.mark.parametrize("target", [abstract, abstract_parts])
def test_numbers_that_orbax_restores_wrongly_are_seen(tmp_path, monkeypatch, target):
    save_steps(tmp_path, [1])
    restore = array_files.ocp.Checkpointer.restore

    def restore_wrongly(*args, **kwargs):
        return jax.tree.map(np.zeros_like, restore(*args, **kwargs))

    monkeypatch.setattr(array_files.ocp.Checkpointer, "restore", restore_wrongly)
    with pytest.raises(errors.UserError, match="arrays differ from those that were"):
        checkpoint.restore_step(tmp_path, 1, target(create_state()))


def test_checkpoints_with_one_digest_can_be_read(tmp_path, monkeypatch):
    """As they were written before each part had its own."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "digest_parts", digest)
        save_steps(tmp_path, [1])
    state = create_state(1)
    restored, info = checkpoint.restore_step(tmp_path, 1, abstract(state))
    assert info["digest"] == digest(state)
    assert_same(restored, state)
    restored, _ = checkpoint.restore_step(tmp_path, 1, abstract_parts(state))
    assert_same(restored, parts(state))
    monkeypatch.setattr(checkpoint, "digest", lambda tree: "another")
    with pytest.raises(errors.UserError, match="arrays differ from those that were"):
        checkpoint.restore_step(tmp_path, 1, abstract(state))


# Parts of a state


def test_parts_are_read_without_the_others(tmp_path):
    save_steps(tmp_path, [1])
    state = create_state(1)
    restored, info = checkpoint.restore_latest(tmp_path, abstract_parts(state))
    assert_same(restored, parts(state))
    assert info["structure"]["step"] == "int32[]"
    with pytest.raises(errors.UserError) as caught:
        checkpoint.restore_latest(
            tmp_path, abstract({"params": state.params["stem"], "batch_stats": {}})
        )
    message = str(caught.value)
    assert "params/kernel is missing" in message
    assert "batch_stats/bn/mean is unexpected" in message
    assert "opt_state" not in message and "step is" not in message
    # A whole state is not made of parts.
    checkpoint.save(tmp_path, 2, parts(state), {})
    with pytest.raises(errors.UserError, match=r"opt_state/.* is missing"):
        checkpoint.restore_latest(tmp_path, abstract(state))


@pytest.mark.parametrize("damage", [flip, os.remove])
def test_damage_to_any_file_is_seen_by_who_reads_parts(tmp_path, damage):
    save_steps(tmp_path, [1, 2])
    target = abstract_parts(create_state())
    folder, good = tmp_path / "checkpoints" / "2", tmp_path / "good"
    shutil.copytree(folder, good)
    for file in [p.relative_to(good) for p in good.rglob("*") if p.is_file()]:
        damage(folder / file)
        state, info = checkpoint.restore_latest(tmp_path, target, set_aside=False)
        assert (file, info["step"]) == (file, 1)
        assert_same(state, parts(create_state(1)))
        with pytest.raises(errors.UserError, match="cannot be read"):
            checkpoint.restore_step(tmp_path, 2, target)
        shutil.copy(good / file, folder / file)
    assert checkpoint.restore_latest(tmp_path, target)[1]["step"] == 2


# Interruption


def test_a_failed_save_leaves_the_one_before(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_info", full)
        with pytest.raises(errors.UserError, match="No space"):
            save_steps(tmp_path, [2])
    assert os.listdir(tmp_path / "checkpoints") == ["1"]
    save_steps(tmp_path, [2])
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["1", "2"]


def test_what_does_not_read_back_is_not_saved(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])
    monkeypatch.setattr(checkpoint, "read_arrays", lambda *_: create_state(3))
    with pytest.raises(errors.UserError, match="does not read back"):
        save_steps(tmp_path, [2])
    assert checkpoint.list_steps(tmp_path) == [1]


@pytest.mark.parametrize("name", ["run[1]", "draft*", "what?", "a b [x]y"])
def test_a_path_that_looks_like_a_pattern(tmp_path, name):
    folder = tmp_path / name
    save_steps(folder, [1, 2])
    state, _ = checkpoint.restore_latest(folder, abstract(create_state()))
    assert_same(state, create_state(2))


def test_a_checkpoint_under_another_name_is_damaged(tmp_path):
    save_steps(tmp_path, [1, 2])
    root = tmp_path / "checkpoints"
    (root / "2").rename(root / "555")
    _, info = checkpoint.restore_latest(tmp_path, abstract(create_state()))
    assert info["step"] == 1
    assert checkpoint.list_steps(tmp_path) == [1]


def test_odd_files_among_the_checkpoints_do_no_harm(tmp_path):
    root = tmp_path / "checkpoints"
    root.mkdir()
    for name in (".DS_Store", "tmp-99", "٣", "007"):
        (root / name).write_text("")
    save_steps(tmp_path, [1])
    assert checkpoint.list_steps(tmp_path) == [1]


def test_a_half_deleted_checkpoint_is_not_listed(tmp_path, monkeypatch):
    save_steps(tmp_path, [1, 2, 3])
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda path: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_steps(tmp_path, [4])
    assert checkpoint.list_steps(tmp_path) == [2, 3, 4]
    save_steps(tmp_path, [5])
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["3", "4", "5"]


SAVE_FOR_EVER = """
import itertools, pathlib, sys
sys.path.insert(0, "tests")
import test_checkpoint
from cvjax.storage import checkpoint
workdir = pathlib.Path(sys.argv[1])
for step in itertools.count((checkpoint.latest_step(workdir) or 0) + 1):
    checkpoint.save(workdir, step, test_checkpoint.create_state(step), {}, keep=2)
    (workdir / "done").write_text(str(step))
"""


def test_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path):
    target = abstract(create_state())
    for delay in (0.013, 0.171, 0.352):
        before = checkpoint.latest_step(tmp_path) or 0
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], cwd=REPOSITORY
        )
        deadline = time.monotonic() + 60
        while (checkpoint.latest_step(tmp_path) or 0) == before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps = checkpoint.list_steps(tmp_path)
        for step in steps:
            state, _ = checkpoint.restore_step(tmp_path, step, target)
            assert_same(state, create_state(step))
        done = tmp_path / "done"
        assert steps[-1] >= (int(done.read_text() or 0) if done.exists() else 0)


# Retention


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 8):
        best = {"step": min(step, 2)}
        checkpoint.save(tmp_path, step, create_state(step), {"best": best}, keep=2)
    assert checkpoint.list_steps(tmp_path) == [2, 6, 7]
    state, _ = checkpoint.restore_step(tmp_path, 2, abstract(create_state()))
    assert_same(state, create_state(2))


def test_the_best_of_the_one_before_is_kept_too(tmp_path):
    """Should the newest be damaged, the one before has its best still."""
    for step, best in [(1, 1), (2, 1), (3, 1), (4, 4), (5, 4)]:
        info = {"best": {"step": best}}
        checkpoint.save(tmp_path, step, create_state(step), info, keep=2)
        if step == 4:
            assert checkpoint.list_steps(tmp_path) == [1, 3, 4]
    assert checkpoint.list_steps(tmp_path) == [4, 5]


def test_without_a_best_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, create_state(step), {"best": None}, keep=1)
    assert checkpoint.list_steps(tmp_path) == [3]


def test_a_step_is_saved_once(tmp_path):
    save_steps(tmp_path, [1])
    with pytest.raises(errors.WorkdirInUse, match="saved by another process"):
        save_steps(tmp_path, [1])
    with pytest.raises(ValueError, match="keep is 0"):
        checkpoint.save(tmp_path, 2, create_state(2), {}, keep=0)


# Checkpoints of other runs


def test_another_network_is_refused_by_name(tmp_path):
    state = create_state(1)
    checkpoint.save(tmp_path, 1, state, {})
    wider = create_state(1, width=8)
    params = {"stem": wider.params["stem"], "tail": wider.params["head"]}
    wider = wider.replace(params=params, step=jnp.float32(1))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(errors.UserError) as caught:
        checkpoint.restore_latest(tmp_path, abstract(wider))
    message = str(caught.value)
    assert str(tmp_path / "checkpoints" / "1") in message
    assert "step is int32[] and not float32[]" in message
    kernel = "params/stem/kernel is float32[3,3,1,4] and not float32[3,3,1,8]"
    assert kernel in message
    assert "params/tail/bias is missing" in message
    assert "params/head/bias is unexpected" in message
    assert "another --workdir" in message
    assert "\n" not in message
    assert sorted(tmp_path.rglob("*")) == before


def test_another_width_alone_is_refused(tmp_path):
    """The same leaves, of other shapes."""
    save_steps(tmp_path, [1])
    with pytest.raises(errors.UserError, match=r"is float32\[4\] and not float32\[8\]"):
        checkpoint.restore_step(tmp_path, 1, abstract(create_state(1, width=8)))


def test_long_lists_of_differences_are_cut(tmp_path):
    layers = {f"layer{i}": jnp.zeros(1) for i in range(9)}
    checkpoint.save(tmp_path, 1, {"params": layers}, {})
    with pytest.raises(errors.UserError, match="layer3 is unexpected and 5 more"):
        checkpoint.restore_latest(tmp_path, {"params": {}})


def test_another_optimizer_is_refused(tmp_path):
    state = create_state(1)
    checkpoint.save(tmp_path, 1, state, {})
    other = state.replace(opt_state=optax.sgd(0.1).init(state.params))
    with pytest.raises(errors.UserError, match=r"opt_state/1/.*trace.* is unexpected"):
        checkpoint.restore_latest(tmp_path, abstract(other))


def test_other_data_and_other_settings_are_refused(tmp_path):
    state = create_state(1)
    model = {"depth": 20, "residual": True, "stages": [3, 3, 3]}
    info = {"data_fingerprint": "12ab", "model": model}
    checkpoint.save(tmp_path, 1, state, info)
    same = {**info, "model": {**model, "stages": (3, 3, 3)}}
    assert checkpoint.restore_latest(tmp_path, abstract(state), same)[1]["step"] == 1
    with pytest.raises(errors.UserError, match="data_fingerprint was '12ab', now 'ff'"):
        checkpoint.restore_latest(tmp_path, abstract(state), {"data_fingerprint": "ff"})
    # A plain and a residual net have the same parameters.
    plain = {"model": {**model, "residual": False}}
    with pytest.raises(errors.UserError, match=r"model.residual was True, now False"):
        checkpoint.restore_step(tmp_path, 1, abstract(state), plain)
    # A field that this version has and that one had not.
    newer = {"model": {**model, "norm_group": 0}}
    assert checkpoint.restore_step(tmp_path, 1, abstract(state), newer)[1]["step"] == 1
    with pytest.raises(errors.UserError, match=r"tag was absent, now 'x'"):
        checkpoint.restore_latest(tmp_path, abstract(state), {"tag": "x"})


def test_an_absent_step_is_named(tmp_path):
    save_steps(tmp_path, [1, 2])
    with pytest.raises(errors.UserError, match=r"no checkpoint of step 9.* steps 1, 2"):
        checkpoint.restore_step(tmp_path, 9, abstract(create_state()))


# Surroundings


def test_orbax_is_not_heard(tmp_path, caplog, capfd):
    filters = list(logging.getLogger("absl").filters)
    with caplog.at_level(logging.DEBUG):
        save_steps(tmp_path, [1])
        checkpoint.restore_latest(tmp_path, abstract(create_state()))
    assert [r.message for r in caplog.records if "orbax" in r.pathname] == []
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("absl").filters == filters


def test_relative_workdirs_are_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_steps("run", [1])
    assert (tmp_path / "run" / "checkpoints" / "1" / "info.json").exists()
    assert checkpoint.restore_latest("run", abstract(create_state()))[1]["step"] == 1


TWO_DEVICES = """
import sys
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from cvjax.storage import checkpoint
workdir = sys.argv[1]
mesh = jax.make_mesh((2,), ("data",))
split = NamedSharding(mesh, PartitionSpec("data"))
x = np.arange(8, dtype=np.float32)
target = {"x": jax.ShapeDtypeStruct((8,), np.float32, sharding=split)}
state, _ = checkpoint.restore_latest(workdir, target)
assert state["x"].sharding == split, state["x"].sharding
assert [s.data.shape for s in state["x"].addressable_shards] == [(4,), (4,)]
np.testing.assert_array_equal(state["x"], x)
checkpoint.save(workdir, 2, {"x": jax.device_put(x + 1, split)}, {})
"""


def test_from_one_device_to_two_and_back(tmp_path):
    x = jnp.arange(8, dtype=jnp.float32)
    checkpoint.save(tmp_path, 1, {"x": x}, {})
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    subprocess.run(
        [sys.executable, "-W", "error", "-c", TWO_DEVICES, str(tmp_path)],
        check=True,
        cwd=REPOSITORY,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)},
    )
    state, info = checkpoint.restore_latest(tmp_path, abstract({"x": x}))
    assert info["step"] == 2
    assert_same(state, {"x": x + 1})


def test_info_must_be_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        checkpoint.save(tmp_path, 1, create_state(1), {"best": float("nan")})
    assert checkpoint.latest_step(tmp_path) is None


def test_info_is_readable_by_anyone(tmp_path):
    save_steps(tmp_path, [3], note="x")
    path = tmp_path / "checkpoints" / "3" / "info.json"
    assert json.loads(path.read_text())["info"]["note"] == "x"

"""Fine-tuning: what is taken over, what stays frozen, what is refused."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from absl import logging
from flax import traverse_util
from jax import numpy as jnp
from run_outcome import outcome

from cvjax import data
from cvjax.data import dataset
from cvjax.data.dataset import ArraySplit, Dataset
from cvjax.data.normalize import Statistics, compute_statistics
from cvjax.errors import InterruptedRun, UserError
from cvjax.models import create_model
from cvjax.storage import checkpoint
from cvjax.training import default_config, loop, train_and_evaluate, transfer
from cvjax.training.optim import OptimConfig, check_freeze, create_optimizer, is_frozen
from cvjax.training.trained_network import load_network

STEPS = 6


def create_config(**settings):
    config = default_config("resnet_cifar")
    config.model.update(depth=8, width=2)
    config.update(total_steps=STEPS, log_every=2, eval_every=3, checkpoint_every=2)
    config.train_eval_examples = 0
    config.data.batch_size = 64
    config.data.eval_batch_size = 300
    config.update_from_flattened_dict(settings)
    return config


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The workdir of a finished run on digits."""
    folder = tmp_path_factory.mktemp("source")
    train_and_evaluate(create_config(), folder)
    return folder


@pytest.fixture
def messages(monkeypatch):
    """What is logged, as text."""
    texts = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            logging, level, lambda text, *values: texts.append(text % values)
        )
    return texts


@pytest.fixture
def six_classes(monkeypatch):
    """The digits below six."""
    digits = data.load("digits")

    def some(split):
        few = split.labels < 6
        return ArraySplit(split.images[few], split.labels[few])

    few = Dataset(
        name="digits",
        train=some(digits.train),
        val=some(digits.val),
        test=some(digits.test),
        class_names=digits.class_names[:6],
        fingerprint="six",
    )
    monkeypatch.setattr(data, "load", lambda *_, **__: few)


def arrays(workdir, step="last"):
    """Path -> array of the variables in a workdir."""
    variables = load_network(workdir, step).variables
    flat = traverse_util.flatten_dict(variables, sep="/")
    return {name: np.asarray(array) for name, array in flat.items()}


def stop_at(monkeypatch, step):
    train_batch = dataset.train_batch

    def patched(split, batch_size, seed, at, share):
        if at == step:
            raise KeyboardInterrupt
        return train_batch(split, batch_size, seed, at, share)

    monkeypatch.setattr(dataset, "train_batch", patched)


def refusal(folder, **settings):
    with pytest.raises(UserError) as caught:
        train_and_evaluate(create_config(**settings), folder)
    # A mended command line must not find a run with other settings here.
    assert not (folder / "config.json").exists()
    return str(caught.value)


# What is taken over


def test_starts_from_the_last_checkpoint(source, tmp_path, monkeypatch, messages):
    first = []
    train = loop.train

    def seen(state, *args, **kwargs):
        first.append(jax.device_get(state))
        return train(state, *args, **kwargs)

    monkeypatch.setattr(loop, "train", seen)
    train_and_evaluate(create_config(init_from=str(source), seed=5), tmp_path)
    variables = {"params": first[0].params, "batch_stats": first[0].batch_stats}
    expected = arrays(source, str(STEPS))
    for name, array in traverse_util.flatten_dict(variables, sep="/").items():
        assert array.tobytes() == expected[name].tobytes(), name
    assert first[0].step == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(first[0].opt_state))
    assert any(
        f"Starting from {source}, step {STEPS} (its last checkpoint): 37 of 37 arrays."
        in text
        for text in messages
    )


def test_starts_from_a_refined_network(source, tmp_path, monkeypatch):
    first = []

    def seen(state, *args, **kwargs):
        first.append(jax.device_get(state))
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", seen)
    settings = {"init_from": str(source), "init_refine": 2, "model.step_size": 0.5}
    settings |= {"model.depth": 10, "model.blocks": (2, 1, 1)}
    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(create_config(**settings), tmp_path)
    variables = {"params": first[0].params, "batch_stats": first[0].batch_stats}
    expected = arrays(source)
    for name, array in traverse_util.flatten_dict(variables, sep="/").items():
        blocks = (0, 0) if "blocks" in name else slice(None)
        assert array.tobytes() == expected[name][blocks,].tobytes(), name
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(first[0].opt_state))


def test_head_of_other_classes_is_drawn_anew(source, tmp_path, six_classes, messages):
    config = create_config(init_from=str(source))
    config.optim.freeze = "stem|stage"  # all but the head
    train_and_evaluate(config, tmp_path)
    before, after = arrays(source), arrays(tmp_path)
    heads = ["params/head/bias", "params/head/kernel"]
    assert after[heads[1]].shape == (8, 6)
    for name in before:
        if name.startswith("params/") and name not in heads:
            assert after[name].tobytes() == before[name].tobytes(), name
    # Those of frozen parts follow the data.
    mean = "batch_stats/stem_bn/mean"
    assert (after[mean] != before[mean]).all()
    said = (
        "Re-initialised, as there are other classes than its 10: params/head/bias, params/"
    )
    assert any(said in text for text in messages)
    assert any("(54 of them trained)" in text for text in messages)  # 8 * 6 + 6


def test_head_of_as_many_other_classes_is_drawn_anew(
    source, tmp_path, monkeypatch, messages
):
    digits = data.load("digits")
    other = dataclasses.replace(digits, class_names=tuple("abcdefghij"))
    monkeypatch.setattr(data, "load", lambda *_, **__: other)
    config = create_config(init_from=str(source))
    train_and_evaluate(config, tmp_path)
    assert any("other classes than its 10: params/head/bias" in text for text in messages)


def test_resume_is_exact_and_does_not_load_again(source, tmp_path, monkeypatch, messages):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    settings = {
        "init_from": str(copy),
        "data.normalization": "init_from",
        "optim.freeze": "stage1",
    }
    train_and_evaluate(create_config(**settings), tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises((KeyboardInterrupt, InterruptedRun)):
            train_and_evaluate(create_config(**settings), tmp_path / "halves")
    shutil.rmtree(copy)
    train_and_evaluate(create_config(**settings), tmp_path / "halves")
    assert any("Resuming at step" in text for text in messages)
    assert outcome(tmp_path / "halves") == outcome(tmp_path / "whole")


def test_statistics_of_the_source(source, tmp_path, six_classes):
    settings = {"init_from": str(source), "data.normalization": "init_from"}
    train_and_evaluate(create_config(**settings), tmp_path / "theirs")
    expected = load_network(source).statistics.mean
    assert (load_network(tmp_path / "theirs").statistics.mean == expected).all()
    own = compute_statistics(data.load("digits").train.images, "pixel_mean").mean
    assert (own != expected).any()


def test_statistics_for_another_size():
    shape = (4, 4, 3)
    mean = jnp.broadcast_to(jnp.array([0.1, 0.2, 0.3]), shape)
    wider = transfer.statistics_like(Statistics(mean, jnp.ones(shape)), (8, 6, 3))
    assert wider.mean.shape == wider.std.shape == (8, 6, 3)
    assert (wider.mean[5, 5] == mean[0, 0]).all()
    uneven = Statistics(mean.at[0, 1, 0].set(0.5), jnp.ones(shape))
    for statistics, size in ((uneven, (8, 8, 3)), (Statistics(mean, mean), (8, 8, 1))):
        with pytest.raises(UserError, match="'init_from' cannot be used"):
            transfer.statistics_like(statistics, size)
    assert transfer.statistics_like(uneven, shape) is uneven


# What is frozen


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_frozen_leaves_keep_every_bit(name):
    optim = OptimConfig(name=name, weight_decay=0.5, decayed="all", freeze="^a/")
    tx = create_optimizer(optim, 10)
    params = {"a": {"x": jnp.array([-0.0, 0.0, 1e-30, 2.0])}, "ba": {"x": jnp.ones(2)}}
    before = np.asarray(params["a"]["x"]).tobytes()
    state = tx.init(params)

    # Not compiled, as XLA drops the addition of a constant zero, which changes -0.0.
    def update(params, state):
        gradient = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    for _ in range(3):
        params, state = update(params, state)
    assert np.asarray(params["a"]["x"]).tobytes() == before
    assert (params["ba"]["x"] < 1).all()


def test_frozen_parameters_train_as_if_they_were_not_there():
    """The others move as they do without them."""
    params = {"a": jnp.ones(3), "b": jnp.arange(3.0)}
    alone = {"b": params["b"]}
    results = []
    for tree, freeze in ((params, "a"), (alone, "")):
        tx = create_optimizer(OptimConfig(freeze=freeze, decayed="all"), 10)
        updates, _ = tx.update(jax.tree.map(jnp.cos, tree), tx.init(tree), tree)
        results.append(np.asarray(updates["b"]))
    assert results[0].tobytes() == results[1].tobytes()


def test_what_an_expression_freezes():
    model = create_model("resnet_cifar", 10, depth=14, width=2)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    )["params"]
    frozen = traverse_util.flatten_dict(is_frozen(shapes, "stem|stage1"), sep="/")
    assert {name.split("/")[0] for name in frozen if frozen[name]} == {
        *("stem_conv", "stem_bn", "stage1")
    }
    assert frozen["stage1/blocks/f/conv1/kernel"] and not frozen["head/kernel"]
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert check_freeze(shapes, "") == total
    # All but head, 8 * 10 + 10.
    assert check_freeze(shapes, "^(?!head)") == 90


# What is refused


def test_freeze_of_nothing_and_of_everything(tmp_path):
    paths = "head, stage1, stage2_transition, stage3_transition, stem_bn, stem_conv."
    for freeze, what in (("stm", "no"), ("", None), (".", "every")):
        if what:
            message = refusal(tmp_path, **{"optim.freeze": freeze})
            assert f"optim.freeze {freeze!r} matches {what} parameter;" in message
            assert message.endswith(paths)
    message = refusal(tmp_path, **{"optim.freeze": "stem("})
    assert "'stem(' is no regular expression" in message


def test_normalization_without_a_source(tmp_path):
    message = refusal(tmp_path, **{"data.normalization": "init_from"})
    assert "init_from is empty" in message


def test_missing_and_foreign_folders(tmp_path):
    message = refusal(tmp_path / "new", init_from=str(tmp_path / "none"))
    assert "is no folder of a run: it has no config.json" in message
    (tmp_path / "config.json").write_text("{}")
    message = refusal(tmp_path / "new", init_from=str(tmp_path))
    assert message.startswith("init_from cannot be used:")
    (tmp_path / "new").mkdir(exist_ok=True)
    message = refusal(tmp_path / "new", init_from=str(tmp_path / "new"))
    assert "is the workdir itself" in message


def test_source_without_a_checkpoint(source, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    shutil.rmtree(copy / "checkpoints")
    message = refusal(tmp_path / "new", init_from=str(copy))
    assert "init_from cannot be used:" in message and "no checkpoint yet" in message


def test_source_that_is_not_finished(source, tmp_path, messages):
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    last = checkpoint.latest_step(copy)
    train_and_evaluate(create_config(init_from=str(copy)), tmp_path / "new")
    assert f"{copy} is not finished; its network is taken as of step {last}." in messages


def test_source_is_another_network(source, tmp_path):
    settings = {"init_from": str(source), "model.shortcut": "none", "model.loop": "rolled"}
    message = refusal(tmp_path, **settings)
    assert "is of another network (model.shortcut was 'A', now 'none');" in message


def test_source_that_cannot_be_refined(source, tmp_path, monkeypatch):
    settings = {"init_from": str(source), "init_refine": 2}
    message = refusal(tmp_path, **settings)
    assert "model.blocks was [2, 1, 1], now []" in message
    assert message.endswith("give the model fields that it has when refined.")
    load_network_ = transfer.networks.load_network

    def as_mlp(*args):
        network = load_network_(*args)
        run = dataclasses.replace(network.run, model={"name": "mlp", "widths": (2,)})
        return dataclasses.replace(network, run=run)

    monkeypatch.setattr(transfer.networks, "load_network", as_mlp)
    assert refusal(tmp_path, **settings) == (
        "init_refine 2 is for networks resnet_cifar, and init_from names a network mlp; "
        "leave init_refine at 1."
    )


def test_source_of_other_images(source, tmp_path, monkeypatch):
    digits = data.load("digits")

    def tripled(split):
        return ArraySplit(np.repeat(split.images, 3, axis=-1), split.labels)

    colour = Dataset(
        name="digits",
        train=tripled(digits.train),
        val=tripled(digits.val),
        test=tripled(digits.test),
        class_names=digits.class_names,
        fingerprint="colour",
    )
    monkeypatch.setattr(data, "load", lambda *_, **__: colour)
    message = refusal(tmp_path, init_from=str(source))
    assert "params/stem_conv/kernel is (3, 3, 1, 2) and not (3, 3, 3, 2)" in message

"""Cascades: by hand, against brute force, and with trained networks."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from cvjax import data
from cvjax.errors import UserError
from cvjax.training import default_config, train_and_evaluate
from experiments.cascade import __main__ as experiment
from experiments.cascade import early_exit
from experiments.cascade import measure as measuring
from experiments.cascade import members as cascade_members
from experiments.cascade.early_exit import NEVER, Plan
from experiments.cascade.figure import pareto_front, tabulate
from experiments.cascade.temperature import fit_temperature


def random_scores(members, n, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(classes), size=(members, n))


# Confidence and exits, by hand


def test_confidence():
    scores = np.array([[0.5, 0.3, 0.2], [1, 0, 0], [1 / 3, 1 / 3, 1 / 3]])
    entropy = -(0.5 * np.log(0.5) + 0.3 * np.log(0.3) + 0.2 * np.log(0.2))
    for measure, wanted in (
        ("max_probability", [0.5, 1, 1 / 3]),
        ("margin", [0.2, 1, 0]),
        ("entropy", [1 - entropy / np.log(3), 1, 0]),
    ):
        assert early_exit.confidence(scores, measure) == pytest.approx(wanted, abs=1e-12)
    with pytest.raises(UserError) as caught:
        early_exit.confidence(scores, "max")
    for word in ("measure", "max_probability, margin, entropy", "'max'"):
        assert word in str(caught.value)


# Three nets, two classes, five examples; the probabilities of the first class.
FIRST = np.array([[0.75, 0.5, 0.25, 0.5, 0.5], [0, 1, 0.5, 0.5, 0.5], [0, 0, 0, 0.25, 1]])
SCORES = np.stack([FIRST, 1 - FIRST], axis=-1)


def test_decisions():
    outcome = early_exit.decide(SCORES, (0.75, 0.75), "max_probability")
    # A confidence at the threshold is enough.
    assert outcome.exits.tolist() == [0, 1, 0, 2, 2]
    wanted = [0.75, (0.5 + 1) / 2, 0.25, 1.25 / 3, 2 / 3]
    assert outcome.scores[:, 0] == pytest.approx(wanted)
    assert outcome.scores.sum(axis=1) == pytest.approx(np.ones(5))


def test_thresholds_at_the_ends():
    everything = early_exit.decide(SCORES, (0, 0), "margin")
    assert (everything.exits == 0).all() and (everything.scores == SCORES[0]).all()
    nothing = early_exit.decide(SCORES, (NEVER, NEVER), "margin")
    assert (nothing.exits == 2).all()
    assert nothing.scores == pytest.approx(SCORES.mean(axis=0))


def test_average_cost():
    # 1 for two of them, 1 + 10 for one, 1 + 10 + 100 for two.
    exits = early_exit.decide(SCORES, (0.75, 0.75), "max_probability").exits
    assert early_exit.average_cost(exits, (1, 10, 100)) == (2 * 1 + 11 + 2 * 111) / 5


# The work that is left out


def test_batch_sizes():
    assert early_exit.batch_sizes(500) == (8, 16, 32, 63, 125, 250, 500)
    assert early_exit.batch_sizes(8) == (8,)
    assert early_exit.batch_sizes(1) == (1,)


@pytest.mark.parametrize("measure", early_exit.MEASURES)
@pytest.mark.parametrize("batch_size", [40, 64, 103, 200])
def test_a_run_says_the_same_and_asks_less(measure, batch_size):
    scores = random_scores(3, 103)
    seen = [[], [], []]

    def net(number):
        def predict(images):
            assert len(images) in early_exit.batch_sizes(batch_size)
            real = images[:, 0] > 0
            seen[number] += images[real, 0].astype(int).tolist()
            answers = np.full((len(images), 4), np.nan)
            answers[real] = scores[number, images[real, 0].astype(int) - 1]
            return answers

        return predict

    means = scores[0], (scores[0] + scores[1]) / 2
    thresholds = [
        np.quantile(early_exit.confidence(mean, measure), part)
        for mean, part in zip(means, (0.503, 0.703), strict=True)
    ]
    images = np.arange(1.0, 104)[:, None]
    nets = [net(number) for number in range(3)]
    outcome = early_exit.run_cascade(nets, images, thresholds, measure, batch_size)
    wanted = early_exit.decide(scores, thresholds, measure)
    assert (outcome.exits == wanted.exits).all()
    assert (outcome.scores == wanted.scores).all()
    for number in range(3):
        assert seen[number] == (np.flatnonzero(wanted.exits >= number) + 1).tolist()
    assert 0 < len(seen[2]) < len(seen[1]) < len(seen[0]) == 103


def test_nobody_undecided():
    def never(images):
        raise AssertionError("nothing is left to ask")

    outcome = early_exit.run_cascade(
        [lambda images: np.full((len(images), 2), 0.5), never],
        np.ones((9, 1)),
        (0.5,),
        "max_probability",
        8,
    )
    assert outcome.exits.tolist() == [0] * 9


# Choosing


def test_choice_by_hand():
    # The small net is wrong where it is least sure, the large one is always right.
    small = np.array([0.9, 0.8, 0.7, 0.6])
    scores = np.stack([small, np.array([1.0, 1, 1, 0])])
    scores = np.stack([scores, 1 - scores], axis=-1)
    labels = np.array([0, 0, 0, 1])
    candidates = early_exit.try_cascades(scores, labels, (1, 10), "max_probability")
    # Of the average at the last example, (0.6 + 0) / 2, the second class is the larger.
    assert early_exit.choose(candidates, min_accuracy=1.0) == Plan(
        (0, 1), (pytest.approx(0.65),), "max_probability"
    )
    assert early_exit.choose(candidates, min_accuracy=0.75) == Plan(
        (0,), (), "max_probability"
    )
    assert early_exit.choose(candidates, max_cost=3.5).members == (0, 1)  # 1 + 10 / 4
    assert early_exit.choose(candidates, max_cost=3.4).members == (0,)
    assert early_exit.choose(candidates, max_cost=0.9) is None
    without = dataclasses.replace(candidates, accuracy=candidates.accuracy * 0.9)
    assert early_exit.choose(without, min_accuracy=0.95) is None


def test_choice_against_brute_force():
    scores = random_scores(2, 40, seed=3)
    labels = np.random.default_rng(4).integers(4, size=40)
    candidates = early_exit.try_cascades(scores, labels, (1, 3), "margin")
    tried = []
    for threshold in np.linspace(0, 1.001, 2000):
        outcome = early_exit.decide(scores, (threshold,), "margin")
        right = (outcome.scores.argmax(axis=1) == labels).mean()
        tried.append((early_exit.average_cost(outcome.exits, (1, 3)), right))
    tried.append((1.0, (scores[0].argmax(axis=1) == labels).mean()))
    tried.append((3.0, (scores[1].argmax(axis=1) == labels).mean()))
    for limit in (1.0, 1.5, 2.0, 2.75, 3.0, 4.0):
        plan = early_exit.choose(candidates, max_cost=limit)
        chosen = scores[list(plan.members)]
        outcome = early_exit.decide(chosen, plan.thresholds, "margin")
        costs = [(1, 3)[number] for number in plan.members]
        assert early_exit.average_cost(outcome.exits, costs) <= limit
        found = (outcome.scores.argmax(axis=1) == labels).mean()
        assert found == max(right for cost, right in tried if cost <= limit)


def test_three_nets_are_not_worse_than_two():
    scores = random_scores(3, 300, seed=5)
    labels = np.random.default_rng(6).integers(4, size=300)
    two, three = (
        early_exit.try_cascades(scores[:count], labels, (1, 3, 9)[:count], "entropy")
        for count in (2, 3)
    )
    assert set(three.members) == set(
        itertools.chain.from_iterable(
            itertools.combinations(range(3), count) for count in (1, 2, 3)
        )
    )
    for limit in (1, 2, 4):
        best = [each.accuracy[each.cost <= limit].max() for each in (two, three)]
        assert best[0] <= best[1]


def test_temperature_by_hand():
    # Two classes, logits a apart, right three times in four: a / T = log(3).
    logits = np.array([[2.0, 0.0]] * 4)
    temperature = fit_temperature(logits, np.array([0, 0, 1, 0]))
    assert temperature == pytest.approx(2 / np.log(3), rel=1e-9)
    # Always right: as sure as is allowed.
    assert fit_temperature(logits, np.zeros(4, int)) == pytest.approx(0.1)


# Figures and tables


def test_pareto_front_by_hand():
    costs, errors = [3, 1, 2, 2, 4, 5], [5, 9, 6, 7, 5, 1]
    assert pareto_front(costs, errors) == [1, 2, 0, 5]


def test_table_by_hand():
    point = {"kind": "single", "name": "a", "macs": 7.0, "milliseconds": 1.0}
    runs = [{"points": [{**point, "error": error}]} for error in (0.1, 0.3)]
    (row,) = tabulate(runs)
    assert row["error"]["mean"] == pytest.approx(0.2)
    assert row["error"]["std"] == pytest.approx(0.02**0.5)
    assert (row["n"], row["name"], row["macs"]["mean"]) == (2, "a", 7)
    (single,) = tabulate(runs[:1])
    assert (single["error"]["mean"], single["error"]["std"]) == (0.1, None)


# Trained networks


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Small nets of digits, hardly trained."""
    folder = tmp_path_factory.mktemp("nets")
    found = []
    for name, fields in (
        ("large", {"name": "mlp", "widths": (64,)}),
        ("small", {"name": "mlp", "widths": (4,)}),
        ("resnet", {"name": "resnet_cifar", "depth": 8, "width": 2}),
    ):
        config = default_config(fields["name"])
        config.model.update(fields)
        config.update(total_steps=40, log_every=40, eval_every=40, train_eval_examples=0)
        train_and_evaluate(config, folder / name)
        found.append((name, folder / name, 0))
    return found


SETTINGS = {
    "measure": "max_probability",
    "calibrate": True,
    "tolerance": 0.0,
    "target_accuracy": None,
    "target_cost": None,
    "batch_size": 64,
}


@pytest.fixture
def clock(monkeypatch):
    """What the candidates take, in units of the first one's, without running them."""
    ratio = {"plan": 0.5}

    def median_seconds(functions):
        return [1.0, *[ratio["plan"]] * (len(functions) - 1)]

    monkeypatch.setattr(measuring, "median_seconds", median_seconds)
    return ratio


def test_members_are_ordered_by_what_they_cost(places):
    members = cascade_members.load_members([*places, ("resized", places[2][1], 4)])
    macs = {member.name: member.macs for member in members}
    assert list(macs) == ["small", "resized", "large", "resnet"]
    assert list(macs.values()) == sorted(macs.values())
    assert (macs["small"], macs["large"]) == (64 * 4 + 4 * 10, 64 * 64 + 64 * 10)
    images = np.zeros((3, 8, 8, 1), np.uint8)
    assert cascade_members.compute_logits(members[1], images).shape == (3, 10)


def test_members_are_measured(places, clock):
    measured = measuring.measure(places[:2], **SETTINGS)
    small, large, both, *_, chosen = measured["points"]
    assert (small["name"], large["name"]) == ("small", "large")
    assert both["macs"] == small["macs"] + large["macs"]
    summary = json.loads((places[0][1] / "summary.json").read_text())
    # The net alone says what it said at the end of its training.
    assert large["error"] == pytest.approx(summary["test/error"], abs=1e-9)
    own = measured["chosen"]
    assert own["agreement"] == 1 and own["reached"][0] == 1
    assert own["difference"] == pytest.approx(large["error"] - chosen["error"])
    assert chosen["macs"] == pytest.approx(
        small["macs"] + own["reached"][1] * large["macs"]
        if len(own["members"]) == 2
        else large["macs"]
    )
    assert all(member["temperature"] != 1 for member in measured["members"])
    kinds = [point["kind"] for point in measured["points"]]
    assert kinds == ["single"] * 2 + ["ensemble"] + ["cascade"] * 10 + ["chosen"]


def test_a_cascade_that_is_slower_is_not_taken(places, clock):
    settings = {**SETTINGS, "target_cost": 0.9}
    own = measuring.measure(places[:2], **settings)["chosen"]
    assert own["members"] == ["small", "large"]
    assert own["agreement"] == 1 and 0 < own["reached"][1] < 1
    assert own["validation_time_ratio"] == 0.5
    clock["plan"] = 1.1
    measured = measuring.measure(places[:2], **settings)
    assert measured["chosen"]["members"] == ["large"]
    assert measured["note"] == (
        "The cascade (small, large) takes 1.10 of the largest net's time on this machine, "
        "so the largest net alone is taken."
    )
    assert measured["chosen"]["macs_ratio"] == 1 and measured["chosen"]["difference"] == 0


def test_tolerance_in_standard_errors(places, clock):
    """What is given away on validation: nothing, or enough for the small net alone."""
    members = cascade_members.load_members(places[:2])
    val = data.load("digits").val
    right = [
        cascade_members.compute_logits(member, val.images).argmax(axis=-1) == val.labels
        for member in members
    ]
    gap = right[1].mean() - right[0].mean()
    # Of yes and no: the root of p (1 - p) / (n - 1).
    unit = (right[1].mean() * (1 - right[1].mean()) / 299) ** 0.5
    for tolerance, alone in ((gap / unit + 0.01, True), (gap / unit - 0.01, False)):
        measured = measuring.measure(places[:2], **{**SETTINGS, "tolerance": tolerance})
        assert (measured["chosen"]["members"] == ["small"]) is alone
        noted = measured["note"] == "One net, small, reaches the target for the least."
        assert noted is alone


def test_members_that_do_not_fit(places, tmp_path, monkeypatch):
    def refusal(places, **settings):
        with pytest.raises(UserError) as caught:
            measuring.measure(places, **{**SETTINGS, **settings})
        return str(caught.value)

    assert refusal(places[:1]) == "a cascade takes two networks or more, got 1."
    assert refusal([places[0], ("x", tmp_path, 0)]) == (
        f"{tmp_path} is no folder of a run: it has no config.json; name "
        "workdirs of train.py."
    )
    assert "takes images of 8x8 pixels only" in refusal([places[0], (*places[1][:2], 4)])
    assert refusal(places[:2], target_accuracy=1.0).startswith(
        "--target_accuracy 1.0 is not reached on validation; the most is 0."
    )
    assert refusal(places[:2], target_cost=0.01) == (
        "--target_cost 0.01 is less than the cheapest network takes, which is 0.062 of the "
        "largest one; give more."
    )
    load_network = cascade_members.load_network

    def patched(place, **changes):
        network = load_network(place)
        return dataclasses.replace(network, **changes) if "small" in str(place) else network

    monkeypatch.setattr(
        cascade_members, "load_network", lambda place: patched(place, data_fingerprint="x")
    )
    assert refusal(places[:2]) == (
        "small was trained on other data or splits than large; a cascade takes networks of "
        "one data set."
    )
    run = load_network(places[1][1]).run
    run = dataclasses.replace(run, loss=dataclasses.replace(run.loss, name="sigmoid"))
    monkeypatch.setattr(
        cascade_members, "load_network", lambda place: patched(place, run=run)
    )
    assert refusal(places[:2]) == (
        "small was trained with loss 'sigmoid'; a cascade takes networks that choose one "
        "class ('softmax')."
    )


# The experiment


def test_nets_of_a_preset(tmp_path):
    plan = experiment.plan_members("medium", 7, 2, tmp_path)
    assert [name for (name, _, _), _ in plan] == ["8x8", "20x8", "20x16"]
    assert len({place for (_, place, _), _ in plan}) == 3
    for (_, config), net in zip(plan, ((8, 8), (20, 8), (20, 16)), strict=True):
        assert (config.model.depth, config.model.width) == net
        assert (config.seed, config.total_steps, config.data.name) == (2, 7, "mnist")
        assert not config.data.flip and not config.data.crop_padding


def test_claim_by_hand():
    """With many images Student's t is normal: 1.96 standard errors, p = 0.05."""
    chosen = {"members": ["a", "b"], "difference": 0.00196}
    chosen["difference_standard_error"] = 0.001
    claim = experiment.contrast({"seed": 3, "chosen": chosen, "examples": 10**6})
    assert claim["seed"] == 3
    assert claim["interval"] == pytest.approx([0, 0.00392], abs=1e-6)
    assert claim["p"] == pytest.approx(0.05, abs=1e-4)


def test_what_is_printed_of_a_seed_has_the_interval():
    chosen = {"members": ["a"], "difference": -0.001, "difference_standard_error": 0.001}
    chosen |= {"macs_ratio": 0.29, "time_ratio": 0.5}
    run = {"seed": 3, "chosen": chosen, "examples": 10**6, "note": ""}
    assert "-0.10 (95 % interval -0.30 to 0.10, p = 0.32)" in experiment.describe(run)


def test_experiment_measures_draws_and_does_nothing_twice(
    places, clock, tmp_path, monkeypatch, capsys
):
    def run():
        runs = [experiment.measure_once(places[:2], SETTINGS, tmp_path, 0)]
        experiment.report(runs, {"preset": "quick", **SETTINGS}, tmp_path)
        return capsys.readouterr().out

    first = run()
    assert f"Figure:  {tmp_path / 'cascade.png'}" in first
    assert (tmp_path / "cascade.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "results.json").read_text())
    assert {"versions", "device", "git"} <= results["runs"][0].keys()
    folders = {name: run_dir for name, run_dir, _ in places}
    for member in results["runs"][0]["members"]:
        run_dir = folders[member["name"]]
        config = json.loads((run_dir / "config.json").read_text())["config"]
        assert member["config"] == config and member["seconds"] >= 0
    assert results["table"][1]["name"] == "large"
    measured = results["runs"][0]["chosen"]
    (claim,) = results["claims"]
    assert claim["difference"] == measured["difference"]
    assert claim["members"] == measured["members"]
    assert f"{measured['macs_ratio']:.2f} of its multiply-adds" in first
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "measure", None)  # would be called, and fail
        assert run() == first
        # Other settings, or nets that were trained on, are measured.
        with pytest.raises(TypeError):
            experiment.measure_once(places[:2], {**SETTINGS, "tolerance": 1.0}, tmp_path, 0)
        patch.setattr(experiment.checkpoint, "latest_step", lambda _: 99)
        with pytest.raises(TypeError):
            run()


def test_mistakes_get_one_sentence():
    for function, sentence in (
        (
            lambda: experiment.check_targets(0.9, 0.5),
            "exclude each other; give one of them.",
        ),
        (
            lambda: experiment.check_targets(90.0, None),
            "a fraction above 0 and up to 1, got 90",
        ),
        (
            lambda: experiment.check_targets(None, 0.0),
            "a fraction, above 0 and up to 1, got 0.0.",
        ),
        (lambda: experiment.parse_member("runs/a@x"), "resized, got 'runs/a@x'."),
        (lambda: experiment.parse_member("runs/a@0"), "resized, got 'runs/a@0'."),
    ):
        with pytest.raises(UserError, match=sentence):
            function()
    assert experiment.parse_member(" runs/a@20")[::2] == ("runs/a@20", 20)
    assert experiment.parse_member("runs/a")[::2] == ("runs/a", 0)

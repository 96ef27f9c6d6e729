"""What a cascade of trained networks gives and costs, chosen on validation, for test."""

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from cvjax.data.dataset import Dataset
from cvjax.errors import UserError
from cvjax.evaluation.predictions import load_data
from cvjax.report.statistics import spread
from experiments.cascade import early_exit
from experiments.cascade.early_exit import Plan
from experiments.cascade.members import (
    Member,
    compute_all_logits,
    compute_probabilities,
    load_members,
    median_seconds,
    run_plan,
)
from experiments.cascade.temperature import fit_temperature

TIMED = 2_000  # images of which times are taken
SWEEP = 10  # cascades beside the chosen one


def measure(
    places: Sequence[tuple[str, pathlib.Path, int]],
    *,
    measure: str,
    calibrate: bool,
    tolerance: float,
    target_accuracy: float | None,
    target_cost: float | None,
    batch_size: int,
) -> dict[str, Any]:
    """Chooses a cascade on validation and measures it on test.

    Args:
      places: see `load_members`.
      measure: one of `cascade.MEASURES`.
      calibrate: whether logits are divided by temperatures, fitted on validation.
      tolerance: how far the target is below the accuracy of the largest network on
        validation, in standard errors of the latter.
      target_accuracy: on validation, instead.
      target_cost: instead, a fraction of the largest network's multiply-adds.
      batch_size: images that the first network sees at a time.

    Returns:
      "points" (see `figure.tabulate`), "chosen" (the cascade that is used, beside
      the largest network) and "note" (why it is none, if so), beside what was given.
    """
    members = load_members(places)
    dataset = load_data(members[0].network, "", "")
    batch_size = min(batch_size, len(dataset.val), len(dataset.test))
    val, test = (
        np.stack(
            [compute_all_logits(member, split.images, batch_size) for member in members]
        )
        for split in (dataset.val, dataset.test)
    )
    if calibrate:
        members = [
            dataclasses.replace(
                member, temperature=fit_temperature(logits, dataset.val.labels)
            )
            for member, logits in zip(members, val, strict=True)
        ]
    val, test = (compute_probabilities(members, logits) for logits in (val, test))
    macs = [member.macs for member in members]
    candidates = early_exit.try_cascades(val, dataset.val.labels, macs, measure)
    if target_accuracy is None and target_cost is None:
        right = val[-1].argmax(axis=-1) == dataset.val.labels
        target_accuracy = right.mean() - tolerance * _standard_error(right)
    wanted = _choose(candidates, macs, target_accuracy, target_cost)
    plan, note, ratio = _check_that_it_pays(members, wanted, dataset, batch_size)
    points = _points(members, candidates, plan, dataset, test, batch_size)

    chosen, largest = points[-1], points[len(members) - 1]
    right = test[-1].argmax(axis=-1) == dataset.test.labels
    difference = chosen.pop("right") - right.astype(float)
    return {
        "data": dataset.name,
        "examples": len(right),
        "members": [
            {"name": m.name, "macs": m.macs, "temperature": m.temperature} for m in members
        ],
        "note": note,
        "standard_error": _standard_error(right),
        "chosen": {
            "members": [members[number].name for number in plan.members],
            "thresholds": list(plan.thresholds),
            "reached": chosen.pop("reached"),
            "agreement": chosen.pop("agreement"),
            "validation_time_ratio": ratio,
            "difference": float(difference.mean()),
            "difference_standard_error": _standard_error(difference),
            "macs_ratio": chosen["macs"] / largest["macs"],
            "time_ratio": chosen["milliseconds"] / largest["milliseconds"],
        },
        "points": points,
    }


def _standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values."""
    return spread(values)["std"] / len(values) ** 0.5


def _choose(candidates, macs, target_accuracy, target_cost) -> Plan:
    if target_cost is not None:
        plan = early_exit.choose(candidates, max_cost=target_cost * macs[-1])
        if plan is None:
            raise UserError(
                f"--target_cost {target_cost} is less than the cheapest network takes, "
                f"which is {macs[0] / macs[-1]:.3f} of the largest one; give more."
            )
        return plan
    plan = early_exit.choose(candidates, min_accuracy=target_accuracy)
    if plan is None:
        raise UserError(
            f"--target_accuracy {target_accuracy} is not reached on validation; the most "
            f"is {candidates.accuracy.max():.4f}."
        )
    return plan


def _check_that_it_pays(
    members: Sequence[Member], plan: Plan, dataset: Dataset, batch_size: int
) -> tuple[Plan, str, float | None]:
    """The plan, or the largest network alone, and why; and the ratio of their times."""
    largest = Plan((len(members) - 1,), (), plan.measure)
    if plan == largest:
        return plan, "No cascade reaches the target for less than the largest net.", None
    images = dataset.val.images[: _whole_batches(len(dataset.val.labels), batch_size)]
    seconds = median_seconds(
        [
            partial(run_plan, members, choice, images, batch_size)
            for choice in (largest, plan)
        ]
    )
    ratio = seconds[1] / seconds[0]
    names = ", ".join(members[number].name for number in plan.members)
    if ratio < 1:
        alone = f"One net, {names}, reaches the target for the least."
        return plan, alone if len(plan.members) == 1 else "", ratio
    note = (
        f"The cascade ({names}) takes {ratio:.2f} of the largest net's time on this "
        "machine, so the largest net alone is taken."
    )
    return largest, note, ratio


def _whole_batches(examples: int, batch_size: int) -> int:
    return max(1, min(examples, TIMED) // batch_size) * batch_size


def _points(
    members: Sequence[Member],
    candidates: early_exit.Candidates,
    plan: Plan,
    dataset: Dataset,
    test: np.ndarray,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Single nets, ensembles, cascades and the chosen one, on test."""
    labels = dataset.test.labels
    count = len(members)
    macs = [member.macs for member in members]
    outcome = run_plan(members, plan, dataset.test.images, batch_size)
    timed = dataset.test.images[: _whole_batches(len(labels), batch_size)]
    singles = [Plan((number,), (), plan.measure) for number in range(count)]
    seconds = median_seconds(
        [
            partial(run_plan, members, choice, timed, batch_size)
            for choice in (*singles, plan)
        ]
    )
    milliseconds = [1000 * value / len(timed) for value in seconds]

    def point(kind, name, scores, cost, time):
        error = float((scores.argmax(axis=-1) != labels).mean())
        return {
            **{"kind": kind, "name": name, "error": error, "macs": float(cost)},
            **{
                "milliseconds": float(time),
                "speed_up": float(milliseconds[count - 1] / time),
            },
        }

    def spent(plan, costs, exits):
        return early_exit.average_cost(exits, [costs[number] for number in plan.members])

    points = [
        point("single", member.name, test[number], member.macs, milliseconds[number])
        for number, member in enumerate(members)
    ]
    for size in range(2, count + 1):
        for chosen in itertools.combinations(range(count), size):
            name = "all of " + ", ".join(members[number].name for number in chosen)
            cost = sum(macs[number] for number in chosen)
            time = sum(milliseconds[number] for number in chosen)
            mean = early_exit.running_means(test[list(chosen)])[-1]
            points.append(point("ensemble", name, mean, cost, time))
    for number, limit in enumerate(np.geomspace(macs[0], macs[-1], SWEEP)):
        # Rounding may take the first limit below the cheapest net.
        choice = early_exit.choose(candidates, max_cost=max(limit, macs[0]))
        decided = early_exit.decide(
            test[list(choice.members)], choice.thresholds, choice.measure
        )
        costs = (spent(choice, each, decided.exits) for each in (macs, milliseconds))
        points.append(point("cascade", f"cascade {number + 1}", decided.scores, *costs))
    known = early_exit.decide(test[list(plan.members)], plan.thresholds, plan.measure)
    chosen = point(
        "chosen",
        "the chosen cascade",
        outcome.scores,
        spent(plan, macs, outcome.exits),
        milliseconds[-1],
    )
    chosen["right"] = (outcome.scores.argmax(axis=-1) == labels).astype(float)
    chosen["agreement"] = float((outcome.exits == known.exits).mean())
    chosen["reached"] = [
        float((outcome.exits >= number).mean()) for number in range(len(plan.members))
    ]
    return [*points, chosen]

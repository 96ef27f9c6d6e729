"""Networks that stop early: a cascade asks the cheapest net first (Wang et al. 2022).

Each net's class probabilities join the average of those before it; where the average is
confident enough, the example is decided and the costlier nets never see it
(arXiv:2012.01988).

  `decide`       what a cascade answers, when the probabilities of all its nets are known:
                 for choosing thresholds
  `run_cascade`  the same answers with the work left out: undecided examples are moved
                 together, so that the next net has a smaller batch. Batches come in a few
                 fixed sizes, for which a net is compiled once.
  `try_cascades`, `choose`   nets and thresholds for a target, on validation

All work on numpy arrays; what a net is, they do not know.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from cvjax.errors import UserError

MEASURES = ("max_probability", "margin", "entropy")
NEVER = float("inf")  # a threshold that no example passes
SMALLEST = 8  # of the fixed batch sizes
CANDIDATES = 5_000  # sets of thresholds that are tried for one choice of nets, about

Predict = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a cascade answers.

    Attributes:
      scores: float64 [n, classes], the average over the nets that were asked.
      exits: int [n], the number (from 0) of the net after which it stopped.
    """

    scores: np.ndarray
    exits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which nets, and when to stop.

    Attributes:
      members: numbers of nets, the cheapest first; one alone is no cascade.
      thresholds: of confidence, one less than members; from there on an example is decided.
      measure: one of `MEASURES`.
    """

    members: tuple[int, ...]
    thresholds: tuple[float, ...]
    measure: str


def confidence(scores: np.ndarray, measure: str) -> np.ndarray:
    """How sure class probabilities are, [..., classes] -> [...] in [0, 1].

    "max_probability" is the largest one, "margin" how much it is above the second, and
    "entropy" one minus the entropy over that of the uniform distribution.

    Raises:
      UserError: for another measure.
    """
    if measure == "max_probability":
        return scores.max(axis=-1)
    if measure == "margin":
        second, first = np.moveaxis(np.sort(scores, axis=-1)[..., -2:], -1, 0)
        return first - second
    if measure == "entropy":
        # 0 log 0 is 0.
        logarithms = np.log(np.where(scores > 0, scores, 1.0))
        return 1 + (scores * logarithms).sum(axis=-1) / np.log(scores.shape[-1])
    raise UserError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}.")


def running_means(scores: np.ndarray) -> np.ndarray:
    """[members, n, classes] -> the averages of the first, the first two, ..."""
    counts = np.arange(1, len(scores) + 1).reshape(-1, 1, 1)
    return np.cumsum(scores, axis=0) / counts


def decide(scores: np.ndarray, thresholds: Sequence[float], measure: str) -> Outcome:
    """The answers of a cascade, from what all of its nets would say.

    Args:
      scores: [members, n, classes], the cheapest net first.
      thresholds: one less than members.
      measure: one of `MEASURES`.
    """
    means = running_means(scores)
    exits = _exits(confidence(means[:-1], measure), thresholds)
    return Outcome(means[exits, np.arange(scores.shape[1])], exits)


def _exits(confidences: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """The first net whose confidence [members - 1, n] is enough, or else the last."""
    enough = confidences >= np.reshape(thresholds, (-1, 1))
    last = np.ones((1, confidences.shape[1]), bool)
    return np.concatenate([enough, last]).argmax(axis=0)


def average_cost(exits: np.ndarray, costs: Sequence[float]) -> float:
    """The mean over the examples of what was spent on them.

    Args:
      exits: see `Outcome`.
      costs: of each net alone, per example; who stops at net k has paid for all up to it.
    """
    return float(np.cumsum(costs)[exits].mean())


def batch_sizes(largest: int) -> tuple[int, ...]:
    """The fixed sizes, rising: the largest, a half of it, a quarter, ... down to a few."""
    sizes = [largest]
    while sizes[-1] > SMALLEST:
        sizes.append(-(-sizes[-1] // 2))
    return tuple(reversed(sizes))


def run_cascade(
    predict: Sequence[Predict],
    images: np.ndarray,
    thresholds: Sequence[float],
    measure: str,
    batch_size: int,
) -> Outcome:
    """Runs a cascade; what `decide` says, and costlier nets see undecided examples only.

    Args:
      predict: one per net, the cheapest first: images [size, ...] to class probabilities
        [size, classes], for each size of `batch_sizes`.
      images: [n, ...].
      thresholds: one less than nets.
      measure: one of `MEASURES`.
      batch_size: how many examples the first net sees at a time.
    """
    parts = [
        _run_batch(predict, images[start : start + batch_size], thresholds, measure, sizes)
        for sizes in (batch_sizes(batch_size),)
        for start in range(0, len(images), batch_size)
    ]
    scores, exits = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Outcome(scores, exits)


def _run_batch(predict, images, thresholds, measure, sizes):
    undecided = np.arange(len(images))
    exits = np.full(len(images), len(predict) - 1)
    total = 0.0
    for number, net in enumerate(predict):
        size = next(size for size in sizes if size >= len(undecided))
        fill = [(0, size - len(undecided))] + [(0, 0)] * (images.ndim - 1)
        answers = net(np.pad(images[undecided], fill))[: len(undecided)]
        total = total + answers
        means = total / (number + 1)
        if number == 0:
            scores = means.copy()
        scores[undecided] = means
        if number == len(predict) - 1:
            break
        confident = confidence(means, measure) >= thresholds[number]
        exits[undecided[confident]] = number
        undecided, total = undecided[~confident], total[~confident]
        if not len(undecided):
            break
    return scores, exits


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Cascades of some nets, as they did on validation.

    Attributes:
      members, thresholds: of each one, as in `Plan`.
      accuracy: of each one, float [cascades].
      cost: of each one, the average of an example, float [cascades].
      measure: one of `MEASURES`.
    """

    members: list[tuple[int, ...]]
    thresholds: list[np.ndarray]
    accuracy: np.ndarray
    cost: np.ndarray
    measure: str


def try_cascades(
    scores: np.ndarray, labels: np.ndarray, costs: Sequence[float], measure: str
) -> Candidates:
    """Tries all choices of nets, single ones included, each with many thresholds.

    The thresholds lie between the confidences that occur: of two nets all such, of more
    those that let certain fractions of the examples go on, in geometric progression.

    Args:
      scores: [nets, n, classes], the cheapest first.
      labels: int [n].
      costs: of each net, per example; multiply-adds, or seconds.
      measure: one of `MEASURES`.
    """
    tried: list[tuple] = []
    for count in range(1, len(scores) + 1):
        for members in itertools.combinations(range(len(scores)), count):
            member_costs = np.asarray(costs, float)[list(members)]
            sets = _try_thresholds(scores[list(members)], labels, member_costs, measure)
            tried += [(members, *row) for row in zip(*sets, strict=True)]
    members, accuracy, cost, thresholds = zip(*tried, strict=True)
    return Candidates(
        list(members), list(thresholds), np.array(accuracy), np.array(cost), measure
    )


def choose(
    candidates: Candidates,
    *,
    min_accuracy: float | None = None,
    max_cost: float | None = None,
) -> Plan | None:
    """The best cascade for one of two targets; of equals, that with fewer nets.

    Args:
      candidates: what there is.
      min_accuracy: wanted is the least cost with this accuracy or more.
      max_cost: wanted is the highest accuracy at this average cost or less.

    Returns:
      The plan; None if nothing meets the target.
    """
    accuracy, cost = candidates.accuracy, candidates.cost
    if min_accuracy is not None:
        fits, keys = accuracy >= min_accuracy, (-accuracy, cost)
    else:
        fits, keys = cost <= max_cost, (cost, -accuracy)
    if not fits.any():
        return None
    # The last key is the first to sort by, and equals stay in order.
    order = np.lexsort([key[fits] for key in keys])
    index = np.flatnonzero(fits)[order[0]]
    thresholds = tuple(map(float, candidates.thresholds[index]))
    return Plan(candidates.members[index], thresholds, candidates.measure)


def _try_thresholds(scores, labels, costs, measure):
    """Accuracy [sets], cost [sets] and thresholds [sets, members - 1] of one choice."""
    means = running_means(scores)
    right = means.argmax(axis=-1) == labels
    spent = np.cumsum(costs)
    if len(scores) == 1:
        return right.mean(axis=1), spent, np.zeros((1, 0))
    confidences = confidence(means[:-1], measure)
    each = max(2, int(CANDIDATES ** (1 / len(confidences))))
    choices = []
    for values in confidences:
        values = np.unique(values)
        # In the middle between two, where rounding does not matter.
        values = (values[1:] + values[:-1]) / 2
        if len(values) > each:
            fractions = np.geomspace(1 / len(values), 1, each)
            values = np.unique(np.quantile(values, fractions, method="nearest"))
        # Where no confidence is enough, that stop is left out.
        choices.append([*values, NEVER])
    sets = np.array(list(itertools.product(*choices)))
    columns = np.arange(scores.shape[1])
    accuracy, cost = np.empty(len(sets)), np.empty(len(sets))
    for number, thresholds in enumerate(sets):
        exits = _exits(confidences, thresholds)
        accuracy[number] = right[exits, columns].mean()
        cost[number] = spent[exits].mean()
    return accuracy, cost, sets

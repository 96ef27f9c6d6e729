"""Members of a cascade: what trained networks say and cost, and how they run together.

`early_exit` has the rules and knows no networks; here are the networks of some workdirs,
compiled for its few sizes of batches.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from cvjax import timing
from cvjax.costs.accounting import account
from cvjax.data.normalize import Statistics, normalize
from cvjax.errors import UserError
from cvjax.evaluation.multicrop import Views, create_views
from cvjax.evaluation.predictions import choose_views
from cvjax.training.trained_network import Network, apply_model, load_network, probabilities
from experiments.cascade import early_exit
from experiments.cascade.early_exit import Plan, Predict

ROUNDS = 7  # timings of each candidate


@dataclasses.dataclass(frozen=True)
class Member:
    """A network and what it costs.

    Attributes:
      name: display name.
      network: as it was trained.
      views: one, which may be of another size.
      macs: multiply-adds per image.
      temperature: that logits are divided by.
    """

    name: str
    network: Network
    views: Views
    macs: int
    temperature: float = 1.0


def load_members(places: Sequence[tuple[str, pathlib.Path, int]]) -> list[Member]:
    """The networks of some workdirs, the cheapest first.

    Args:
      places: of each a name, its workdir, and the size that its images are resized to (0
        for their own).

    Raises:
      UserError: they cannot answer the same question, or their cost is not known.
    """
    check_places(places)
    members = []
    for name, run_dir, size in places:
        network = load_network(run_dir)
        height, width, channels = network.image_shape
        if network.run.loss.name != "softmax":
            raise UserError(
                f"{name} was trained with loss {network.run.loss.name!r}; a cascade takes "
                "networks that choose one class ('softmax')."
            )
        if height != width:
            raise UserError(
                f"{name} takes images of {height}x{width}, which are no squares."
            )
        if members and network.data_fingerprint != members[0].network.data_fingerprint:
            raise UserError(
                f"{name} was trained on other data or splits than {members[0].name}; a "
                "cascade takes networks of one data set."
            )
        views = choose_views(network, 1, (size,) if size else ())
        cost = account(network.recipe.model, size or height, channels)
        if cost.loops:
            raise UserError(
                f"what {name} costs is only known when it runs ({', '.join(cost.loops)}); "
                "take networks with a fixed number of steps."
            )
        members.append(Member(name, network, views, cost.macs))
    return sorted(members, key=lambda member: member.macs)


def check_places(places: Sequence[tuple[str, pathlib.Path, int]]) -> None:
    """Raises UserError unless these are two workdirs or more, see `load_members`."""
    if len(places) < 2:
        raise UserError(f"a cascade takes two networks or more, got {len(places)}.")
    for _, run_dir, _ in places:
        if not (run_dir / "config.json").is_file():
            raise UserError(
                f"{run_dir} is no folder of a run: it has no config.json; name workdirs of "
                "train.py."
            )


@partial(jax.jit, static_argnames=("model", "views"))
def _apply(
    variables: Any,
    images: jax.Array,
    statistics: Statistics,
    *,
    model: nn.Module,
    views: Views,
) -> jax.Array:
    (view,) = create_views(normalize(images, statistics), views)
    return apply_model(variables, view, model=model)


def compute_logits(member: Member, images: np.ndarray) -> np.ndarray:
    """uint8 images of a size that is compiled for -> float32 [images, classes]."""
    logits = _apply(
        member.network.variables,
        images,
        member.network.statistics,
        model=member.network.recipe.model,
        views=member.views,
    )
    return np.asarray(logits)


def predictor(member: Member) -> Predict:
    """Images -> class probabilities, as `cascade.run_cascade` takes it."""

    def predict(images):
        return probabilities(compute_logits(member, images) / member.temperature, "softmax")

    return predict


def run_plan(
    members: Sequence[Member], plan: Plan, images: np.ndarray, batch_size: int
) -> early_exit.Outcome:
    """Runs the cascade of a plan on uint8 images."""
    nets = [predictor(members[number]) for number in plan.members]
    return early_exit.run_cascade(nets, images, plan.thresholds, plan.measure, batch_size)


def compute_all_logits(member: Member, images: np.ndarray, batch_size: int) -> np.ndarray:
    """As in `run_cascade`, where a last smaller batch is filled up."""
    parts = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        fill = [(0, batch_size - len(part))] + [(0, 0)] * (images.ndim - 1)
        parts.append(compute_logits(member, np.pad(part, fill))[: len(part)])
    return np.concatenate(parts)


def compute_probabilities(members: Sequence[Member], logits: np.ndarray) -> np.ndarray:
    """[members, n, classes], float64."""
    return np.stack(
        [
            probabilities(values / member.temperature, "softmax")
            for member, values in zip(members, logits, strict=True)
        ]
    )


def median_seconds(functions: Sequence[Callable[[], Any]]) -> list[float]:
    """The median seconds of each, interleaved, after one run that compiles."""
    times = timing.interleave(dict(enumerate(functions)), ROUNDS)
    return [float(np.median(seconds)) for seconds in times.values()]

"""What the channels of a trained network respond to (Zeiler and Fergus 2013, section 4).

Of each channel of a layer (see `maps`) those images are found whose strongest response is
the strongest of all images', each image once. The patch shown is the receptive field of
that one unit (see `receptive_field`; what GroupNorm's statistics bring in from elsewhere is
left out), and beside it stands what comes back to these pixels from the unit (see
`backprojection`).

Functions take the map as a function of normalised images, in which no image sees another.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import numpy as jnp

from cvjax.costs.jaxpr_counter import Counter, Flow, Scope
from cvjax.costs.receptive_field import Span
from experiments.filters.guided_backprop import with_rule

MapOf = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Top:
    """The strongest responses of each channel, the strongest first.

    Attributes:
      values: float32 [channels, count].
      images: int [channels, count], numbers of the images.
      places: int [channels, count, 2], row and column on the map.
    """

    values: np.ndarray
    images: np.ndarray
    places: np.ndarray

    @property
    def dead(self) -> np.ndarray:
        """bool [channels]: those that no image makes positive, so that ReLU stops them."""
        return self.values[:, 0] <= 0


def receptive_spans(apply: MapOf, image_shape: tuple[int, int, int]) -> tuple[Span, Span]:
    """What a map sees of the height and of the width; exact, and nothing is computed."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    jaxpr = jax.make_jaxpr(apply)(image).jaxpr
    flow = Flow(layer=0, spans=(Span(0, 0, 1, 1), Span(0, 0, 1, 2)))
    (result,) = Counter(image, [flow], "").run(jaxpr, [flow], Scope((), ()))
    return result.spans


def find_top(apply: MapOf, batches: Sequence[np.ndarray], count: int) -> Top:
    """The `count` strongest responses of each channel, in different images.

    Args:
      apply: images -> map [n, height, width, channels]; jitted here.
      batches: of images, [n, height, width, channels] each.
      count: responses per channel; fewer if there are fewer images.
    """

    @jax.jit
    def strongest(images):
        maps = apply(images)
        flat = maps.reshape(len(maps), -1, maps.shape[-1])
        rows, columns = jnp.unravel_index(flat.argmax(axis=1), maps.shape[1:3])
        return flat.max(axis=1), jnp.stack([rows, columns], axis=-1)

    found = [jax.device_get(strongest(batch)) for batch in batches]
    values, places = (np.concatenate(part) for part in zip(*found, strict=True))
    # Stable, so that of equals the first one counts.
    order = np.argsort(-values, axis=0, kind="stable")[:count].T
    channels = np.arange(len(order))[:, None]
    return Top(values[order, channels], order, places[order, channels])


def project(
    apply: MapOf,
    images: jax.Array,
    channels: np.ndarray,
    places: np.ndarray,
    rule: str,
) -> np.ndarray:
    """What goes back to the pixels from one unit per image.

    Args:
      apply: images -> map [n, height, width, channels]; jitted here.
      images: [n, height, width, channels].
      channels: int [n], of the unit on each image's map.
      places: int [n, 2], its row and column.
      rule: a key of `backprojection.RULES`.

    Returns:
      float32, of the shape of the images; the unit's own value is not multiplied in.
    """
    units = (jnp.arange(len(images)), places[:, 0], places[:, 1], channels)

    @jax.jit
    def back(images):
        return jax.grad(lambda x: with_rule(apply, rule)(x)[units].sum())(images)

    return np.asarray(back(jnp.asarray(images)))


def cut_out(
    image: np.ndarray, spans: tuple[Span, Span], place: np.ndarray, fill: float
) -> np.ndarray:
    """The receptive field of the unit at a place, with `fill` where it leaves the image.

    Along a side that is not longer than the receptive field, the whole image is given.
    """
    for axis, (span, position) in enumerate(zip(spans, place, strict=True)):
        size = image.shape[axis]
        if span.field >= size:
            continue
        low, high = (position * span.jump + end for end in (span.low, span.high))
        pads = [(0, 0)] * image.ndim
        pads[axis] = (max(0, -low), max(0, high + 1 - size))
        image = np.pad(image, pads, constant_values=fill)
        image = np.take(image, np.arange(low, high + 1) + pads[axis][0], axis=axis)
    return image


def class_agreement(labels: np.ndarray) -> np.ndarray:
    """float [channels]: of the labels [channels, count], the share of the most common."""
    return np.array([np.bincount(row).max() / len(row) for row in labels])


def chance_agreement(labels: np.ndarray, count: int) -> float:
    """What `class_agreement` is on average for `count` of these images, drawn at random."""
    draws = np.random.default_rng(0).permuted(np.tile(labels, (2_000, 1)), axis=1)
    return float(class_agreement(draws[:, :count]).mean())

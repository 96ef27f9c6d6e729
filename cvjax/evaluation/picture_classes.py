"""Which classes a network names on one picture."""

from collections.abc import Iterator

import numpy as np

from cvjax.data.image_files import load_picture
from cvjax.data.normalize import normalize
from cvjax.evaluation.picture import Answer, Asked
from cvjax.training.trained_network import Network, apply_model, probabilities

THRESHOLD = 0.5  # of the probability of a class, where a picture has several


def predict(network: Network, image: np.ndarray) -> np.ndarray:
    """Class probabilities, float64 [classes], of an image uint8 of the network's shape."""
    images = normalize(image[None], network.statistics)
    logits = apply_model(network.variables, images, model=network.recipe.model)
    return probabilities(logits, network.run.loss.name)[0]


def most_probable(
    scores: np.ndarray, class_names: tuple[str, ...], count: int
) -> Iterator[tuple[str, float]]:
    """The names and probabilities of the `count` most probable classes, in that order."""
    for k in np.argsort(-scores, kind="stable")[:count]:
        yield class_names[k], float(scores[k])


def answer_one(network: Network, path: str, asked: Asked) -> Answer:
    """The most probable classes of a picture file.

    Raises:
      UserError: it cannot be read.
    """
    return _named(network, _scores(network, path, asked), asked.top)


def answer_several(network: Network, path: str, asked: Asked) -> Answer:
    """All classes of a picture file that are probable enough.

    Raises:
      UserError: it cannot be read.
    """
    scores = _scores(network, path, asked)
    return _named(network, scores, int((scores >= asked.least(THRESHOLD)).sum()))


def _scores(network: Network, path: str, asked: Asked) -> np.ndarray:
    resize = network.run.data.resize
    return predict(network, load_picture(path, network.image_shape, asked.border, resize))


def _named(network: Network, scores: np.ndarray, count: int) -> Answer:
    named = list(most_probable(scores, network.class_names, count))
    top = [{"class": name, "probability": probability} for name, probability in named]
    rows = [f"{100 * probability:8.2f} %  {name}" for name, probability in named]
    return Answer({"top": top}, rows)

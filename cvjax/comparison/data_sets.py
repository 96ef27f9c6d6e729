"""Which runs had the same pictures: by their content, for folders change and move."""

import dataclasses
import os
from collections.abc import Sequence

from cvjax.comparison.runs import Run
from cvjax.data.names import OWN

# What a data set's fingerprint may depend on beside the files.
SHAPING = ("name", "image_size", "resize", "shrink", "stretch")
SHAPING += ("train_examples", "val_examples")


def name_data_sets(runs: Sequence[Run]) -> list[Run]:
    """The runs with one `data.data_dir` in their configs for the same pictures of a user.

    It is that of the first of them. Where a folder has changed between two runs, that of
    the later one has the beginning of the data set's fingerprint behind it.
    """
    homes: dict[tuple, str] = {}  # of a content the folder where it was seen first
    contents: dict[tuple, str] = {}  # of a folder the content that it had first
    labels: dict[str, str] = {}
    named = []
    for run in runs:
        given = run.config["data.data_dir"]
        if run.config["data.name"] in OWN and given:
            shape = tuple(run.config[f"data.{key}"] for key in SHAPING)
            home = os.path.realpath(os.path.expanduser(given))
            if run.fingerprint:
                home = homes.setdefault((shape, run.fingerprint), home)
            label = labels.setdefault(home, given)
            if contents.setdefault((shape, home), run.fingerprint) != run.fingerprint:
                label += f" ({run.fingerprint[:8] or 'unknown'})"
            config = {**run.config, "data.data_dir": label}
            run = dataclasses.replace(run, config=config)
        named.append(run)
    return named

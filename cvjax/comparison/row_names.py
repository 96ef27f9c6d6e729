"""What rows are called: by the settings that differ between them."""

import collections
import json
from collections.abc import Sequence
from typing import Any


def row_names(configs: Sequence[dict[str, Any]], *, full: bool = False) -> list[str]:
    """The names of rows from what differs between their configs.

    A key counts where two rows have different values of it; one of the model where two rows
    of the same model have. The model's name stands alone, and keys lose their group where
    that leaves them unique; but not with `full`.
    """
    values = collections.defaultdict(set)
    for config in configs:
        for key, value in config.items():
            values[_scope(config, key), key].add(json.dumps(value))
    shown = [
        [key for key in config if len(values[_scope(config, key), key]) > 1]
        for config in configs
    ]
    last = collections.Counter(key.rpartition(".")[2] for key in set().union(*shown))
    names = []
    for config, keys in zip(configs, shown, strict=True):
        parts = []
        # The net comes first, and of the net its name.
        for key in sorted(keys, key=lambda key: (key != "model.name", key[:6] != "model.")):
            short = key.rpartition(".")[2]
            unique = last[short] == 1 and short != "name"
            label = short if unique and not full else key
            value = config[key]
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            alone = key == "model.name" and not full
            parts.append(text if alone else f"{label}={text}")
        names.append(" ".join(parts) or str(config.get("model.name", "all")))
    return names


def _scope(config: dict[str, Any], key: str) -> str:
    """Fields of one model say nothing of those of another."""
    of_model = key.startswith("model.") and key != "model.name"
    return config.get("model.name", "") if of_model else ""

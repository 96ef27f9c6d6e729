"""Rewrites results of before to the shape of experiments/runner.py; no number changes.

python results/rewrite.py
"""

import json
import pathlib
from collections import Counter

from experiments.runner import PROVENANCE, RESULTS, join_parts

FOLDER = pathlib.Path(__file__).parent
STAMP = ("versions", "device", "prng_impl", "threefry_partitionable", "git", "created")
STAMP += ("command",)


def numbers(tree) -> Counter:
    """The numbers in a tree of JSON, and how often each is there."""
    if isinstance(tree, dict | list):
        values = tree.values() if isinstance(tree, dict) else tree
        return sum((numbers(value) for value in values), Counter())
    is_number = isinstance(tree, int | float) and not isinstance(tree, bool)
    return Counter([tree] if is_number else [])


def rename(tree: dict, old: str, new: str) -> dict:
    return {new if key == old else key: value for key, value in tree.items()}


def rewrite(name: str, preset: str, old: dict) -> dict:
    new = {"preset": preset, **old}
    if name == "augmentation":
        new = rename(new, "told", "labels")
    if name == "complexity":
        new["provenance"] = {key: new.pop(key) for key in STAMP}
    if name == "depth_degradation":
        new = rename(new, "contrasts", "claims")
        for part in ("table", "runs"):
            new[part] = [rename(row, "training_seconds", "seconds") for row in new[part]]
    if name == "filters":
        new = rename(new, "layers", "table")
        new["runs"] = [{"seed": old["seed"], "step": old["step"]}]
    if name in ("continuous_limit", "learning_rates"):
        parts = ("solvers", "orders", "blocks", "rates", "capacity", "regularisation")
        tables = {part: new.pop(part) for part in parts if part in new}
        new["table"] = join_parts(tables)
        tests = {"range": new.pop("range")} if "range" in new else {}
        new["runs"] = join_parts({**new["runs"], **tests})
    if name == "odenet_vs_resnet":
        parts = {part["name"]: part for part in new.pop("data")}
        for key in ("table", "swap_table"):
            new[key] = join_parts({data: part[key] for data, part in parts.items()})
        new["swap_examples"] = next(iter(parts.values()))["swap_examples"]
        new["costs"] = {data: part["costs"] for data, part in parts.items()}
        new["runs"] = [run for part in parts.values() for run in part["runs"]]
    new = {"claims": [], "runs": [], "provenance": None, **new}
    if name not in ("multilevel", "cascade"):  # whose runs are made of several
        unknown = dict.fromkeys((*PROVENANCE, "seconds"))
        new["runs"] = [{**unknown, **run} for run in new["runs"]]
    own = {key: value for key, value in new.items() if key not in RESULTS}
    first, last = RESULTS[:2], RESULTS[2:]
    new = {key: new[key] for key in first} | own | {key: new[key] for key in last}
    assert numbers(old) <= numbers(new), name
    return new


def main() -> None:
    for path in sorted(FOLDER.glob("*/*.json")):
        old = json.loads(path.read_text())
        if "experiment" not in old or old.keys() >= set(RESULTS):
            continue
        preset = path.stem.partition("_")[0]
        new = rewrite(path.parent.name, preset, old)
        path.write_text(json.dumps(new, indent=2) + "\n")
        print(path)


if __name__ == "__main__":
    main()

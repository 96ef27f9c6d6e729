"""What reading, decoding and cropping JPEG files costs, and what streaming them keeps.

    python -m benchmarks.streaming --workdir=results/benchmarks/streaming

By default of a set that is written first: crops of the two photographs that come with
scikit-learn, 500x375 and 375x500, some 100 kB each, about as ImageNet's; `--name` takes
another one that is prepared. Parts: milliseconds of processor time per image. Pipeline:
images through grain with 0, 1, 2 ... workers, per second (of the clock: other programs on
the machine count) and per core-second (of the processor time of all these processes).
Medians with quartiles. Memory: with full buffers, after the first batch and after an epoch.
"""

import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags, logging
from PIL import Image

from benchmarks.photograph_set import photograph, write_set
from cvjax import cli, data
from cvjax.cores import core_count
from cvjax.data.dataset import Dataset
from cvjax.data.image_files import center_crop, scale_crop
from cvjax.data.streaming import StreamOptions
from cvjax.files import write_bytes, write_json
from cvjax.report import tables
from cvjax.storage import provenance
from cvjax.storage import workdir as workdirs

SETTLE_SECONDS = 3.0  # for the workers to fill their buffers


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("workdir", None, "Where results.json and table.md go.")
    flags.DEFINE_string("name", "", "A prepared TFDS set; empty for one that is written.")
    flags.DEFINE_string("data_dir", "", "Where prepared sets are.")
    flags.DEFINE_integer("images", 4_000, "Of the set that is written.", lower_bound=100)
    flags.DEFINE_integer("image_size", 224, "Side of the crops.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Images per batch.", lower_bound=1)
    flags.DEFINE_integer("rounds", 10, "Timings of each part.", lower_bound=1)
    flags.DEFINE_list("workers", ["0", "1", "2"], "Numbers of workers.")


def main(arguments):
    cli.refuse_arguments(arguments)
    values = flags.FLAGS
    folder = workdirs.check_writable(values.workdir) if values.workdir else None
    with contextlib.ExitStack() as stack:
        name, data_dir = values.name, values.data_dir
        if not name:
            data_dir = stack.enter_context(tempfile.TemporaryDirectory())
            name = "photographs"
            logging.info("Writing %d images.", values.images)
            splits = {"train": range(values.images), "test": range(100)}
            write_set(
                pathlib.Path(data_dir),
                {split: map(photograph, numbers) for split, numbers in splits.items()},
            )
        short = round(values.image_size * 256 / 224), round(values.image_size * 480 / 224)
        open_set = functools.partial(data.load_stream, name, data_dir=data_dir)
        options = functools.partial(StreamOptions, values.image_size, *short)
        dataset = open_set(options())
        results = {
            "benchmark": "streaming",
            "set": describe(name, dataset),
            "image_size": values.image_size,
            "batch_size": values.batch_size,
            "cores": core_count(),
            "parts": measure_parts(dataset, values.rounds, values.batch_size, short),
            "pipeline": [
                measure_pipeline(open_set(options(num_workers=int(n))), values.batch_size)
                for n in values.workers
            ],
            "measured_by": provenance.current(),
        }
    tables.show(caption(results), HEADINGS, rows(results))
    if folder:
        write_json(folder / "results.json", results)
        write_bytes(folder / "table.md", markdown(results).encode())


def describe(name: str, dataset: Dataset) -> dict[str, Any]:
    """Numbers and mean sizes of the training images."""
    encoded = dataset.train.examples.records.probe()
    sizes = [Image.open(io.BytesIO(image)).size for image, _ in encoded]
    decoded = len(dataset.train) * int(np.prod(dataset.image_shape))
    return {
        "name": name,
        "train_images": len(dataset.train),
        "kilobytes": float(np.mean([len(image) for image, _ in encoded])) / 1e3,
        "megapixels": float(np.mean([w * h for w, h in sizes])) / 1e6,
        "decoded_mb": decoded / 1e6,
    }


def measure_parts(
    dataset: Dataset, rounds: int, batch_size: int, short: tuple[int, int]
) -> dict[str, dict[str, float]]:
    """Milliseconds of processor time per image: median and quartiles of each part."""
    records, size = dataset.train.examples.records, dataset.image_shape[0]
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {
        part: [] for part in ("read", "decode", "scale crop", "centre crop")
    }

    def timed(part: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        done = work()
        times[part].append(1e3 * (time.process_time() - start) / batch_size)
        return done

    for _ in range(rounds):
        chosen = rng.choice(dataset.train.indices, batch_size)
        encoded = timed("read", lambda: records.read(chosen))  # noqa: B023
        opened = [Image.open(io.BytesIO(image)) for image, _ in encoded]
        pictures = timed("decode", lambda: [p.convert("RGB") for p in opened])  # noqa: B023
        draws = [(rng.integers(short[0], short[1] + 1), rng.random(2)) for _ in pictures]
        pairs = list(zip(pictures, draws, strict=True))
        timed("scale crop", lambda: [scale_crop(p, size, *d) for p, d in pairs])  # noqa: B023
        timed("centre crop", lambda: [center_crop(p, size) for p in pictures])  # noqa: B023
    return {part: _summary(each) for part, each in times.items()}


def measure_pipeline(dataset: Dataset, batch_size: int) -> dict[str, Any]:
    """One epoch through grain: rates over laps of it, and memory early and late."""
    num_workers = dataset.train.num_workers
    steps = len(dataset.train) // batch_size
    lap = max(1, steps // 8)
    free = shutil.disk_usage("/dev/shm").free
    rates: dict[str, list[float]] = {"second": [], "core_second": []}
    memory = {}
    start = time.perf_counter()
    with contextlib.closing(dataset.train.train_batches(batch_size, 0)) as batches:
        next(batches)
        first_seconds = time.perf_counter() - start
        pids = [os.getpid(), *(each.pid for each in multiprocessing.active_children())]
        time.sleep(SETTLE_SECONDS)
        memory["early"] = _memory(pids, free)
        # What was ready beforehand says nothing of the speed.
        taken = 1 + sum(1 for _ in itertools.islice(batches, 5 * num_workers + 1))
        while taken + lap <= steps:
            wall, core = time.perf_counter(), _core_seconds(pids)
            taken += sum(1 for _ in itertools.islice(batches, lap))
            images = lap * batch_size
            rates["second"].append(images / (time.perf_counter() - wall))
            rates["core_second"].append(images / (_core_seconds(pids) - core))
        time.sleep(SETTLE_SECONDS)
        memory["late"] = _memory(pids, free)
    return {
        "workers": num_workers,
        "first_batch_seconds": first_seconds,
        "images_per": {unit: _summary(each) for unit, each in rates.items()},
        "batch_mb": batch_size * int(np.prod(dataset.image_shape)) / 1e6,
        "memory_mb": memory,
    }


def _core_seconds(pids: list[int]) -> float:
    """Processor time of these processes so far."""
    ticks = 0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _memory(pids: list[int], free: int) -> dict[str, float]:
    """Megabytes: private to this process, the most of a worker, shared."""
    own, *workers = [_private(pid) for pid in pids]
    return {
        "own": own,
        "worker": max(workers, default=0.0),
        "shared": (free - shutil.disk_usage("/dev/shm").free) / 1e6,
    }


def _private(pid: int) -> float:
    lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1e3


def _summary(values: list[float]) -> dict[str, float]:
    low, median, high = np.percentile(values, (25, 50, 75))
    return {"median": median, "low": low, "high": high, "n": len(values)}


HEADINGS = ("what", "median", "quartiles", "n", "memory")


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """The table's cells."""
    parts = results["parts"]
    cells = []
    for part, each in parts.items():
        spread = f"{each['low']:.2f} to {each['high']:.2f}"
        cells.append((f"{part}, ms", f"{each['median']:.2f}", spread, str(each["n"]), ""))
    total = sum(parts[part]["median"] for part in ("read", "decode", "scale crop"))
    cells.append(
        ("images per core-second, the parts of training", f"{1e3 / total:.0f}", "", "", "")
    )
    for each in results["pipeline"]:
        late = each["memory_mb"]["late"]
        shared = late["shared"] / each["batch_mb"]
        memory = f"own {late['own']:.0f} MB"
        if each["workers"]:
            memory += (
                f", a worker {late['worker']:.0f} MB, shared {late['shared']:.0f} MB "
                f"({shared:.0f} batches)"
            )
        for unit, rate in each["images_per"].items():
            cells.append(
                (
                    f"{each['workers']} workers, images per {unit.replace('_', '-')}",
                    f"{rate['median']:.0f}",
                    f"{rate['low']:.0f} to {rate['high']:.0f}",
                    str(rate["n"]),
                    memory,
                )
            )
            memory = ""
    return cells


def caption(results: dict[str, Any]) -> str:
    """What was measured, in one sentence."""
    described = results["set"]
    return (
        f"{described['train_images']:,} JPEG files of {described['kilobytes']:.0f} kB and "
        f"{described['megapixels']:.2f} megapixels, crops of {results['image_size']}, "
        f"batches of {results['batch_size']}, {results['cores']} core(s); decoded, the set "
        f"is {described['decoded_mb']:.0f} MB"
    )


def markdown(results: dict[str, Any]) -> str:
    """The table for reading on the web."""
    commit = (results["measured_by"]["git"] or {}).get("commit", "unknown")[:8]
    head = f"{caption(results)}; commit {commit}. See results.json."
    return f"{head}\n\n{tables.markdown(HEADINGS, rows(results))}"


if __name__ == "__main__":
    define_flags()
    cli.run(main)

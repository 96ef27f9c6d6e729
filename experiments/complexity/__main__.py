"""What the networks cost: activations, parameters, multiply-adds, receptive fields.

    python -m experiments.complexity --workdir=results/complexity
    python -m experiments.complexity --model=vgg --fields=depth=16 --layers

Without --model: all networks of `zoo` at the image sizes they were made for, a table in
summary.md, results.json and a figure, published accuracy against operations, in
the manner of Canziani et al. 2017 (arXiv:1605.07678); with that the layers of VGG-16, as in
the classic lecture. With --model: that network, with --layers layer by layer. What is
counted, and by which conventions, says `cvjax.costs.accounting`.

--preset=quick counts, nothing is compiled: half a minute on two CPU cores. --preset=full
also compiles each network, forward and with gradients, and shows XLA's own figures beside
(`cvjax.costs.compiled`): ten minutes at first, one when JAX has cached them; networks of
more than 56 layers are only counted.

The accuracies are published ones, each with its source in results.json: torchvision's
weights IMAGENET1K_V1 (https://docs.pytorch.org/vision/stable/models.html).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags, logging

from cvjax import cli, files
from cvjax.checks import check_choice
from cvjax.costs import compiled
from cvjax.costs.accounting import Account, account
from cvjax.errors import UserError
from cvjax.models import SAME_FUNCTION, create_model, model_fields
from cvjax.report import tables
from cvjax.storage import workdir as workdirs
from experiments import runner
from experiments.complexity.figure import draw_complexity
from experiments.complexity.zoo import ZOO, Entry

DEEPEST_COMPILED = 56
MEBIBYTE = 2**20

PRESET = flags.DEFINE_enum("preset", "quick", ["quick", "full"], "Count, or compile too.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the results; none by default.")
MODELS = flags.DEFINE_list("models", None, "Only these models of the zoo: vgg,resnet.")
MODEL = flags.DEFINE_string("model", None, "One model instead of the zoo.")
FIELDS = flags.DEFINE_list("fields", [], "Its fields, such as depth=16,head=small.")
LAYERS = flags.DEFINE_bool("layers", False, "Its layers one by one.")
IMAGE_SIZE = flags.DEFINE_integer(
    "image_size", None, "Side in pixels instead of the zoo's.", lower_bound=1
)
NUM_CLASSES = flags.DEFINE_integer(
    "num_classes", None, "Classes instead of the zoo's.", lower_bound=1
)

Table = tuple[list[str], list[list[str]]]  # headings and cells

CONVENTIONS = """\
One image in evaluation mode; a batch of B has B times the activations and MACs. MACs are \
multiply-adds of convolutions and matrix products, padding included; FLOPs in the strict \
sense are twice as many. Activations: the input and all outputs of convolutions, pools and \
dense layers, while everything elementwise (ReLU, BatchNorm, sums) overwrites what it \
reads; stored: with the outputs of those too. The receptive field is that of one output, \
padding included; the jump is the distance between the fields of two neighbours."""

COMPILED = """\
XLA's FLOPs include elementwise operations and leave out products with the zeros of the \
padding. Its memory is that of its plan for a batch of 1: weights and images, results \
(logits, or the gradients), and the most that lies between at one time. Compiled for \
{device}; with gradients: cross entropy in training mode and its gradient with respect to \
the weights."""

LECTURE = """\
The classic slide (CS231n) sums this column to "24M * 4 bytes ~= 93 MB": its own entries \
add up to the 15.2M values found here, {megabytes:.1f} MB ({mebibytes:.1f} MiB). With the \
outputs of ReLU stored it is {kept:.1f}M values; twice either with gradients."""


def main(arguments):
    cli.refuse_arguments(arguments)
    if MODEL.value is None and (FIELDS.value or LAYERS.value):
        raise UserError("--fields and --layers are about one network: give --model=NAME.")
    if MODEL.value is not None and MODELS.value is not None:
        raise UserError("--model is one network, --models some of the zoo: give one only.")
    entries = [find_entry()] if MODEL.value else select(MODELS.value)
    folder = workdirs.check_writable(WORKDIR.value) if WORKDIR.value else None
    overrides = {"image_size": IMAGE_SIZE.value, "num_classes": NUM_CLASSES.value}
    overrides = {key: value for key, value in overrides.items() if value}
    entries = [_resized(entry, overrides) for entry in entries]

    counted, rows = {}, []
    for number, entry in enumerate(entries, start=1):
        logging.info("%d of %d: %s.", number, len(entries), entry.label)
        model = create_model(entry.model, entry.num_classes, **entry.fields)
        counted[entry.label] = account(model, entry.image_size)
        rows.append(summarize(entry, counted[entry.label]))
        depth = entry.fields.get("depth", 0)
        if PRESET.value == "full" and depth <= DEEPEST_COMPILED:
            rows[-1]["compiled"] = compiled.measure(model, entry.image_size)

    summary = tabulate_summary(rows)
    show("Costs for one image", summary)
    if PRESET.value == "full":
        show("Counted and compiled, batch of 1", tabulate_compiled(rows))
    only = counted[entries[0].label]
    if LAYERS.value:
        show(entries[0].label, tabulate_layers(only), describe(entries[0].label, only))
    if folder:
        write(folder, rows, counted)


def select(names: Sequence[str] | None) -> list[Entry]:
    """The entries of the zoo, or those of the models of those names."""
    known = sorted({entry.model for entry in ZOO})
    for name in names or ():
        check_choice("--models", name, known)
    return [entry for entry in ZOO if names is None or entry.model in names]


def find_entry() -> Entry:
    """The network of --model and --fields, with the image size of its kin in the zoo."""
    fields = cli.parse_fields(FIELDS.value)
    alike = [entry for entry in ZOO if entry.model == MODEL.value]
    for entry in alike:
        if fields and _complete(entry.fields) == _complete(fields):
            return dataclasses.replace(entry, fields=fields)
    label = " ".join([MODEL.value, *FIELDS.value])
    like = alike[0] if alike else Entry(label, MODEL.value, image_size=32, num_classes=10)
    return Entry(
        label,
        MODEL.value,
        fields,
        image_size=like.image_size,
        num_classes=like.num_classes,
    )


def _resized(entry: Entry, overrides: dict[str, int]) -> Entry:
    """An entry for other images or classes; what was published is not about it."""
    other = dataclasses.replace(entry, **overrides)
    if other == entry:
        return entry
    sizes = [f"{key}={value}" for key, value in overrides.items()]
    label = " ".join([entry.label, *sizes])
    return dataclasses.replace(other, label=label, top1=None, source=None)


def _complete(fields: dict[str, Any]) -> dict[str, Any]:
    """All fields of --model that decide what it computes, given or not."""
    defaults = {name: field.default for name, field in model_fields(MODEL.value).items()}
    known = defaults | fields
    return {name: known[name] for name in known if name not in SAME_FUNCTION}


def summarize(entry: Entry, counted: Account) -> dict[str, Any]:
    """The row of a network in results.json."""
    return {
        **dataclasses.asdict(entry),
        "parameters": counted.parameters,
        "macs": counted.macs,
        "macs_with_gradients": counted.macs_with_gradients,
        "activations": counted.values,
        "activation_bytes": counted.bytes,
        "activations_stored": counted.kept,
        "receptive_field": counted.field,
        "loops_counted_once": list(counted.loops),
    }


def tabulate_summary(rows: list[dict[str, Any]]) -> Table:
    headings = ["network", "image", "parameters", "MACs", "with gradients"]
    headings += ["activations", "stored", "field", "top-1 %"]
    cells = [
        [
            row["label"],
            f"{row['image_size']}²",
            f"{row['parameters']:,}",
            f"{row['macs']:,}",
            f"{row['macs_with_gradients']:,}",
            f"{row['activations']:,}",
            f"{row['activations_stored']:,}",
            dash(row["receptive_field"]),
            dash(row["top1"]),
        ]
        for row in rows
    ]
    return headings, cells


def tabulate_compiled(rows: list[dict[str, Any]]) -> Table:
    headings = ["network", "pass", "2 x G MACs", "XLA GFLOPs", "weights etc. MiB"]
    headings += ["results MiB", "temporaries MiB"]
    cells = []
    for row in rows:
        for key, figures in row.get("compiled", {}).items():
            macs = row["macs" if key == "forward" else "macs_with_gradients"]
            sizes = [figures[name] for name in ("arguments", "results", "temporaries")]
            cells.append(
                [
                    row["label"],
                    key.replace("_", " "),
                    f"{2 * macs / 1e9:,.3f}",
                    f"{figures['flops'] / 1e9:,.3f}",
                    *(f"{size / MEBIBYTE:,.1f}" for size in sizes),
                ]
            )
    return headings, cells


def tabulate_layers(counted: Account) -> Table:
    """Layer by layer, the sums in the last row."""
    headings = ["layer", "output", "activations", "bytes", "stored", "parameters", "MACs"]
    headings += ["field", "jump"]
    cells = [
        [
            row.name,
            "x".join(map(str, row.output)),
            *(f"{n:,}" for n in (row.values, row.bytes, row.kept)),
            *(f"{n:,}" for n in (row.parameters, row.macs)),
            dash(row.field),
            dash(row.jump),
        ]
        for row in counted.layers
    ]
    totals = (counted.values, counted.bytes, counted.kept, counted.parameters)
    cells.append(["sum", "", *(f"{n:,}" for n in (*totals, counted.macs)), "", ""])
    return headings, cells


def describe(label: str, counted: Account) -> str:
    """What stands below the table of layers."""
    lines = [
        CONVENTIONS,
        f"Forward and backward: {2 * counted.values:,} values (each activation has a "
        f"gradient), {2 * counted.parameters:,} parameters and gradients, "
        f"{counted.macs_with_gradients:,} MACs (each layer also for the gradient of its "
        "weights and, unless it reads the images, of its input).",
    ]
    if label == "VGG-16":
        sizes = {"megabytes": counted.bytes / 1e6, "mebibytes": counted.bytes / MEBIBYTE}
        lines.append(LECTURE.format(**sizes, kept=counted.kept / 1e6))
    if counted.loops:
        names = ", ".join(counted.loops)
        lines.append(f"The trips of a loop are not known; one is counted: {names}.")
    return "\n\n".join(lines)


def dash(value: Any) -> str:
    return "-" if value is None else f"{value:,}"


def show(title: str, table: Table, note: str = "") -> None:
    headings, cells = table
    tables.show(title, headings, cells, total=cells[-1][0] == "sum")
    if note:
        print(note)


def markdown(table: Table) -> str:
    headings, cells = table
    cells = [["**sum**", *row[1:]] if row[0] == "sum" else row for row in cells]
    return tables.markdown(headings, cells)


def write(folder, rows: list[dict[str, Any]], counted: dict[str, Account]) -> None:
    """results.json, summary.md, NETWORK.md where layers are wanted, complexity.png."""
    sheets = {"summary.md": ("Costs for one image", tabulate_summary(rows), CONVENTIONS)}
    if any("compiled" in row for row in rows):
        note = COMPILED.format(device=jax.devices()[0].device_kind)
        sheets["compiled.md"] = ("Counted and compiled", tabulate_compiled(rows), note)
    for label, network in counted.items():
        if LAYERS.value or label == "VGG-16":
            name = f"{label.lower().replace('-', '').replace(' ', '_')}.md"
            size = next(row["image_size"] for row in rows if row["label"] == label)
            title = f"{label}, layer by layer, {size}x{size}"
            sheets[name] = (title, tabulate_layers(network), describe(label, network))
    for name, (title, table, note) in sheets.items():
        text = f"### {title}\n\n{markdown(table)}\n{note}\n"
        files.write_bytes(folder / name, text.encode())
        print(f"Table:   {folder / name}")
    more = {}
    if LAYERS.value:
        (network,) = counted.values()
        layers = [{**dataclasses.asdict(row), "bytes": row.bytes} for row in network.layers]
        more["layers"] = layers
    runner.write_results(folder, "complexity", PRESET.value, **more, table=rows, runs=[])
    print(f"Results: {folder / 'results.json'}")
    drawn = [row for row in rows if row["top1"] and row["image_size"] == 224]
    if len(drawn) > 1:
        draw_complexity(drawn, folder / "complexity.png")
        print(f"Figure:  {folder / 'complexity.png'}")


if __name__ == "__main__":
    cli.run(main)

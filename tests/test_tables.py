"""Tables on the terminal and in Markdown, and a mean with its spread."""

import pytest
import rich.cells
import rich.console
import rich.text

from cvjax.report import tables

HEADINGS = ("net", "error", "steps")
ROWS = [["plain [a]", "20.00 ± 14.14", "1"], ["residual", "-", "diverged"]]


def test_a_mean_with_its_spread():
    value = {"mean": 0.2, "std": 0.141421}
    assert tables.mean_std(value) == "0.20 ± 0.14"
    assert tables.mean_std(value, 1, 100) == tables.percent(value, 1) == "20.0 ± 14.1"
    assert tables.percent({"mean": 0.2, "std": None}) == "20.00"
    assert tables.mean_std(None) == "-"


def test_markdown_aligns_numbers_to_the_right():
    assert tables.markdown(HEADINGS, ROWS).splitlines() == [
        "| net | error | steps |",
        "| --- | ---: | --- |",
        "| plain [a] | 20.00 ± 14.14 | 1 |",
        "| residual | - | diverged |",
    ]


def test_no_cell_is_cut_or_read_as_markup(capsys):
    long = ["x" * 200, "1" * 100, "[bold]"]
    tables.show("a [title]", HEADINGS, [*ROWS, long])
    shown = capsys.readouterr().out
    assert "a [title]" in shown
    for row in (HEADINGS, *ROWS, long):
        assert any(all(cell in line for cell in row) for line in shown.splitlines()), row


def test_a_sum_is_set_off(capsys):
    tables.show("", HEADINGS, ROWS)
    plain = capsys.readouterr().out.splitlines()
    tables.show("", HEADINGS, ROWS, total=True)
    assert len(capsys.readouterr().out.splitlines()) == len(plain) + 1


def test_intervals_and_p_in_words():
    test = {"difference": 0.038, "interval": [0.005, 0.071], "p": 0.0367, "df": 2.2}
    assert tables.difference(test, 1, 100) == "+3.8 (95 % interval 0.5 to 7.1, p = 0.037)"
    assert tables.percent_interval(test) == "0.50 to 7.10"
    assert tables.p_value(0.0002) == "p < 0.001"
    alone = {"difference": -0.01, "interval": None, "p": None, "df": None}
    assert tables.difference(alone) == "-0.01 (no p)"
    assert tables.interval(alone) == tables.interval(None) == "-"


WIDE = (
    *("run", "n", "state", "MACs per image (10^6)", "validation error (%)"),
    *("test error (%)", "test error at best validation (%)", "training (minutes)"),
    *("difference of test error (%)", "95 % interval", "p"),
)
NAMES = ("resnet_cifar depth=56 learning_rate=0.1 shortcut=none", "odenet 数字", "vgg")
NUMBERS = ("125.49", "7.12 ± 0.31", "8.12 ± 0.31", "8.10 ± 0.20", "161.2 ± 13.0")
STATES = ("finished", "finished 2; diverged 1 (step 35 of 400)", "finished")


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_a_narrow_terminal_gets_all_in_blocks(width, monkeypatch, capsys):
    console = rich.console.Console
    monkeypatch.setattr(
        "rich.console.Console", lambda: console(width=width, force_terminal=True)
    )
    rest = ("+0.33", "-0.22 to 1.22", "0.034 (Welch)")
    lines = [
        [name, str(3 + number), STATES[number], *NUMBERS, *rest]
        for number, name in enumerate(NAMES)
    ]
    tables.show("rows", WIDE, lines, total=True)
    shown = rich.text.Text.from_ansi(capsys.readouterr().out).plain
    assert all(rich.cells.cell_len(line) <= width for line in shown.splitlines())
    blocks = shown.split("run ")[1:]
    assert len(blocks) == {80: 3, 100: 2, 120: 2, 160: 1}[width]
    for block in blocks:
        for part in " ".join(NAMES).split():
            assert part in block
    for cells in zip(*lines, strict=True):
        words = cells[0][:1].isalpha()
        for cell in " ".join(cells).split() if words else cells:
            assert cell in shown
    for number in range(len(NAMES)):
        assert any(f" {3 + number} " in line for line in blocks[0].splitlines())
    lines = blocks[0].splitlines()
    (second,) = (number for number, line in enumerate(lines) if NAMES[1] in line)
    folded = not any(NAMES[0] in line and STATES[1] in shown for line in lines)
    assert folded == (not lines[second - 1].strip())  # an empty line where rows are folded
    for heading in WIDE:
        assert all(word in shown for word in heading.split())


@pytest.mark.parametrize("width", [4, 20, 60])
def test_numbers_are_not_cut_where_there_is_no_room(width, monkeypatch, capsys):
    console = rich.console.Console
    monkeypatch.setattr(
        "rich.console.Console", lambda: console(width=width, force_terminal=True)
    )
    # The first two columns together tell the rows apart.
    rows = [[start, depth, "0.123456 ± 0.012345"] for start in "ab" for depth in "12"]
    tables.show("t", ("start", "depth", "error"), rows)
    shown = rich.text.Text.from_ansi(capsys.readouterr().out).plain
    assert shown.count("0.123456 ± 0.012345") == 4
    tables.show("", ("only",), [["1"]])
    tables.show("", ("a", "b"), [])

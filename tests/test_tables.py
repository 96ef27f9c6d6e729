"""Tables on the terminal and in Markdown, and a mean with its spread."""

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

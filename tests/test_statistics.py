"""Means, intervals and differences, by hand and beside SciPy's tests."""

import math

import numpy as np
import pytest
import scipy.stats

from cvjax.report import statistics

A, B = [1.0, 2.0, 3.0], [5.0, 9.0, 4.0, 6.0]


def test_interval_of_a_mean_by_hand():
    found = statistics.spread(A)
    assert (found["mean"], found["std"]) == (2, 1)
    # Student's t with 2 degrees of freedom is beyond 4.302653 with probability 0.025.
    half = 4.302653 / math.sqrt(3)
    assert found["interval"] == pytest.approx([2 - half, 2 + half], rel=1e-6)


def test_a_single_value_has_no_spread():
    assert statistics.spread([0.5]) == {"mean": 0.5, "std": None, "interval": None}


def test_welch_by_hand():
    # With two values each and equal variances, df is 2 and the t distribution elementary:
    # P(T > t) = 1/2 - t / (2 sqrt(2 + t^2)).
    found = statistics.difference([4.0, 6.0], [1.0, 3.0])
    t = 3 / math.sqrt(2)
    assert found["difference"] == 3
    assert found["df"] == pytest.approx(2)
    assert found["p"] == pytest.approx(1 - t / math.sqrt(2 + t * t))
    half = 4.302653 * math.sqrt(2)
    assert found["interval"] == pytest.approx([3 - half, 3 + half], rel=1e-6)
    assert found["n"] == [2, 2]


def test_columns_as_one_by_one():
    values = np.array([[1.0, 4.0, 2.0], [3.0, 4.5, 2.0]])
    means, stds = statistics.spread_of_columns(values)
    assert means == pytest.approx([2, 4.25, 2])
    assert stds == pytest.approx([math.sqrt(2), 0.5 / math.sqrt(2), 0])
    assert statistics.spread_of_columns(values[:1])[1].tolist() == [0, 0, 0]


def test_welch_as_scipy():
    found = statistics.difference(A, B)
    theirs = scipy.stats.ttest_ind(A, B, equal_var=False)
    assert found["p"] == pytest.approx(theirs.pvalue)
    assert found["df"] == pytest.approx(theirs.df)
    assert found["interval"] == pytest.approx(list(theirs.confidence_interval()))
    assert found["n"] == [3, 4]


def test_pairs_as_scipy():
    after, before = [1.0, 2.5, 3.1], [0.5, 1.0, 2.9]
    found = statistics.paired_difference(after, before)
    theirs = scipy.stats.ttest_rel(after, before)
    assert found["p"] == pytest.approx(theirs.pvalue)
    assert found["df"] == 2
    assert found["interval"] == pytest.approx(list(theirs.confidence_interval()))


def test_of_a_known_standard_error_as_scipy():
    sample = statistics.spread(A)
    error = sample["std"] / math.sqrt(len(A))
    found = statistics.t_test(sample["mean"] - 0.5, error, len(A) - 1)
    theirs = scipy.stats.ttest_1samp(A, 0.5)
    assert found["p"] == pytest.approx(theirs.pvalue)
    ends = [end - 0.5 for end in theirs.confidence_interval()]
    assert found["interval"] == pytest.approx(ends)


def test_from_a_published_number_as_scipy():
    found = statistics.difference_from(A, 0.5)
    assert found["p"] == pytest.approx(scipy.stats.ttest_1samp(A, 0.5).pvalue)
    assert found["difference"] == 1.5
    known = statistics.difference_from(A, (6.0, math.sqrt(14 / 3), 4))
    expected = statistics.difference(A, B)
    for key in ("difference", "df", "p", "interval"):
        assert known[key] == pytest.approx(expected[key])


@pytest.mark.parametrize(
    "found",
    [
        statistics.difference([0.2], [0.1, 0.3]),
        statistics.difference([0.2, 0.2], [0.1, 0.1]),
        # 0.3 - 0.2 and 0.2 - 0.1 differ in the last digit.
        statistics.paired_difference([0.2, 0.3], [0.1, 0.2]),
        statistics.difference_from([0.2], 0.1),
    ],
)
def test_no_p_where_a_sample_is_alone_or_nothing_varies(found):
    assert found["p"] is found["interval"] is found["df"] is None


def test_exponent_of_exact_powers():
    counts = [2, 4, 8]
    assert statistics.fit_exponent(counts, [3 / n for n in counts]) == pytest.approx(-1)

"""Scores, intervals and paired tests against scipy, scikit-learn, published examples and their own laws."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import binomtest, chi2, norm, spearmanr
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

from onebase import statistics as ob
from onebase.errors import ConfigError

COUNT = st.integers(0, 60)


def table(both: int, fixed: int, broken: int, neither: int) -> tuple[list[bool], list[bool]]:
    """Lay out a paired 2x2 table as (correct_a, correct_b)."""
    a = [True] * both + [False] * fixed + [True] * broken + [False] * neither
    b = [True] * both + [True] * fixed + [False] * broken + [False] * neither
    return a, b


# ------------------------------------------------------------------------------------------ classification


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_classification_metrics_equal_sklearn(pairs):
    predicted, actual = [f"l{p}" for p, _ in pairs], [f"l{a}" for _, a in pairs]
    labels = ["l3", "l0", "l4", "l1", "l2"]  # an order of its own
    got = ob.classification_metrics(predicted, actual, labels)
    scores = precision_recall_fscore_support(actual, predicted, labels=labels, zero_division=0)
    for i, label in enumerate(labels):
        one = got["per_label"][label]
        assert [one["precision"], one["recall"], one["f1"]] == pytest.approx([s[i] for s in scores[:3]])
        assert one["support"] == scores[3][i]
    for key, average in (("macro_f1", "macro"), ("weighted_f1", "weighted")):
        want = precision_recall_fscore_support(actual, predicted, average=average, zero_division=0)[2]
        assert got[key] == pytest.approx(want)
    assert got["confusion"] == confusion_matrix(actual, predicted, labels=labels).tolist()
    assert got["accuracy"] == pytest.approx(np.mean([p == a for p, a in pairs]))
    assert ob.macro_f1(ob.label_rows(predicted, actual, labels)) == pytest.approx(got["macro_f1"])


def test_classification_metrics_are_plain_python_and_survive_json():
    got = ob.classification_metrics(np.array([0, 1, 1]), np.array([0, 0, 1]), np.array([0, 1, 2]))
    assert got["confusion"] == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]  # rows actual
    assert got["per_label"][2] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert got["macro_f1"] == pytest.approx(2 / 3)  # label 2 never occurs and does not count
    assert json.loads(json.dumps(got))["labels"] == [0, 1, 2]


@pytest.mark.parametrize(
    ("predicted", "actual", "labels", "words"),
    [
        (["a"], ["a", "b"], ["a", "b"], "predicted has 1 examples and actual has 2"),
        ([], [], ["a"], "predicted is empty"),
        (["a"], ["a"], [], "labels is empty"),
        (["posv"], ["pos"], ["pos", "neg"], r"predicted\[0\] is 'posv'.*Did you mean 'pos'"),
        (["a"], ["c"], ["a", "b"], r"actual\[0\] is 'c'"),
        (["a"], ["a"], ["a", "b", "a"], "'a' is given twice in labels, at 0 and 2"),
        ("ab", ["a", "b"], ["a", "b"], "single text 'ab'"),
    ],
)
def test_classification_metrics_refuse_bad_labels(predicted, actual, labels, words):
    with pytest.raises(ConfigError, match=words):
        ob.classification_metrics(predicted, actual, labels)


# ------------------------------------------------------------------------------------------ one interval


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),  # Newcombe 1998 (Statistics in Medicine 17, 857-872), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_accuracy_interval_equals_newcombes_published_examples(right, n, low, high):
    got = ob.accuracy_interval([True] * right + [False] * (n - right))
    assert got == pytest.approx((low, high), abs=5e-5)


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=80), st.sampled_from([0.8, 0.95, 0.99]))
def test_accuracy_interval_equals_scipy_and_mirrors(correct, level):
    low, high = ob.accuracy_interval(correct, level)
    want = binomtest(sum(correct), len(correct)).proportion_ci(level, method="wilson")
    assert (low, high) == pytest.approx((want.low, want.high), abs=1e-12)
    assert 0 <= low <= np.mean(correct) <= high <= 1
    mirror = ob.accuracy_interval([not c for c in correct], level)
    assert mirror == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_accuracy_interval_covers_in_simulation():
    rng, inside = np.random.default_rng(3), 0
    for right in rng.binomial(60, 0.85, size=800):
        low, high = ob.accuracy_interval(np.arange(60) < right)
        inside += low <= 0.85 <= high
    assert 0.93 <= inside / 800 <= 0.98  # standard error of 800 draws at 95 % is 0.008


def test_bootstrap_interval_of_a_mean_is_close_to_the_normal_one():
    values = np.random.default_rng(0).normal(5, 2, size=400)
    low, high = ob.bootstrap_interval(values, draws=4000)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.15 * half)


def test_bootstrap_interval_covers_in_simulation():
    rng, inside = np.random.default_rng(5), 0
    for seed in range(150):
        low, high = ob.bootstrap_interval(rng.exponential(1.0, 50), seed=seed, draws=200)
        inside += low <= 1.0 <= high
    assert 0.85 <= inside / 150 <= 0.99  # percentile intervals of skewed values fall a little short of 95 %


def test_bootstrap_interval_takes_a_statistic_of_indices():
    values = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0])
    by_index = ob.bootstrap_interval(np.arange(6), lambda drawn: values[drawn].mean(), seed=7)
    assert by_index == ob.bootstrap_interval(values, seed=7)


@settings(deadline=None, max_examples=15)
@given(st.lists(st.tuples(st.floats(0, 50), st.integers(1, 20)), min_size=2, max_size=20), st.integers(0, 2**32))
def test_perplexity_interval_is_seeded_and_within_the_examples_perplexities(rows, seed):
    sums, counts = zip(*rows)
    got = ob.perplexity_interval(sums, counts, seed=seed, draws=100)
    assert got == ob.perplexity_interval(sums, counts, seed=seed, draws=100)
    each = np.exp(np.array(sums) / np.array(counts))
    assert each.min() * (1 - 1e-9) <= got[0] <= got[1] <= each.max() * (1 + 1e-9)


def test_perplexity_weights_tokens_not_examples():
    rows = ob.token_rows([10.0, 1.0], [10, 100])
    assert ob.perplexity(rows) == pytest.approx(math.exp(11 / 110))
    assert ob.mean(np.array([1.0, 2.0])) == 1.5


# ------------------------------------------------------------------------------------------ McNemar


def test_mcnemar_equals_published_examples():
    # Bentur et al. 2009 in Fagerland, Lydersen & Laake 2014 (Statistics in Medicine 33, 2850-2875), Tango
    airway = ob.mcnemar_exact(*table(1, 7, 1, 12))
    assert (airway.low, airway.high) == pytest.approx((0.026, 0.517), abs=5e-4)
    assert airway.p_value == pytest.approx(0.0703125)
    # Agresti, Categorical Data Analysis, approval of the prime minister; Wald: -0.0587 to -0.0213
    approval = ob.mcnemar_exact(*table(794, 86, 150, 570))
    assert (approval.difference, approval.fixed, approval.broken, approval.n) == (-0.04, 86, 150, 1600)
    assert (approval.low, approval.high) == pytest.approx((-0.0587, -0.0213), abs=5e-4)


def tango_ends(fixed: int, broken: int, n: int, z: float) -> list[float]:
    """Invert Tango's score test another way: maximise the likelihood of q by search, then find the roots."""

    def score(d: float) -> float:
        low, high = max(0.0, -d), (1 - d) / 2
        for _ in range(200):  # ternary search: the log-likelihood of q is concave
            one, two = low + (high - low) / 3, high - (high - low) / 3
            fit = [
                fixed * math.log(q + d) + broken * math.log(q) + (n - fixed - broken) * math.log(1 - 2 * q - d)
                for q in (one, two)
            ]
            low, high = (one, high) if fit[0] < fit[1] else (low, two)
        return (fixed - broken - n * d) / math.sqrt(n * (2 * low + d * (1 - d)))

    estimate = (fixed - broken) / n
    return [
        brentq(lambda d: score(d) - z, -0.95, estimate),
        brentq(lambda d: score(d) + z, estimate, 0.95),
    ]


@pytest.mark.parametrize(("fixed", "broken", "n"), [(12, 2, 50), (40, 20, 160), (16, 6, 161), (3, 9, 30)])
def test_mcnemar_interval_inverts_the_score_test(fixed, broken, n):
    got = ob.mcnemar_exact(*table(n - fixed - broken, fixed, broken, 0))
    assert [got.low, got.high] == pytest.approx(tango_ends(fixed, broken, n, norm.ppf(0.975)), abs=1e-5)


@settings(deadline=None, max_examples=200)
@given(COUNT, COUNT, COUNT, COUNT, st.sampled_from([0.8, 0.95, 0.99]))
def test_mcnemar_laws(both, fixed, broken, neither, level):
    if both + fixed + broken + neither == 0:
        both = 1
    a, b = table(both, fixed, broken, neither)
    got, swapped = ob.mcnemar_exact(a, b, level), ob.mcnemar_exact(b, a, level)
    assert swapped == replace(
        got,
        difference=-got.difference,
        low=-got.high,
        high=-got.low,
        fixed=got.broken,
        broken=got.fixed,
    )
    assert got.difference == pytest.approx(np.mean(b) - np.mean(a))
    assert -1 <= got.low <= got.difference <= got.high <= 1
    if fixed + broken:
        assert got.p_value == pytest.approx(binomtest(fixed, fixed + broken).pvalue)
        chi = (fixed - broken) ** 2 / (fixed + broken)
        if abs(chi - chi2.ppf(level, 1)) > 1e-6:
            assert got.excludes_zero == (chi > chi2.ppf(level, 1))
    else:
        assert got.p_value == 1 and not got.excludes_zero


@pytest.mark.parametrize(("fixed", "neither"), [(1, 0), (50, 0), (0, 1), (0, 50), (3, 4)])
def test_mcnemar_on_edge_tables(fixed, neither):
    got, z2 = ob.mcnemar_exact(*table(0, fixed, 0, neither)), norm.ppf(0.975) ** 2
    n = fixed + neither
    if fixed == 0:  # closed forms of the score interval without disagreement and with nothing else
        assert (got.low, got.high) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)))
    elif neither == 0:
        assert (got.low, got.high) == pytest.approx(((n - z2) / (n + z2), 1.0))


def test_mcnemar_p_never_underflows_to_zero():
    assert ob.mcnemar_exact(*table(0, 5000, 0, 0)).p_value == sys.float_info.min


def test_mcnemar_covers_and_keeps_its_level_in_simulation():
    rng, covered, rejected, runs = np.random.default_rng(11), 0, 0, 400
    for _ in range(runs):
        both, fixed, broken, neither = rng.multinomial(120, [0.6, 0.15, 0.05, 0.2])
        got = ob.mcnemar_exact(*table(both, fixed, broken, neither))
        covered += got.low <= 0.10 <= got.high
        null = ob.mcnemar_exact(*table(*rng.multinomial(120, [0.6, 0.1, 0.1, 0.2])))
        rejected += null.p_value <= 0.05
    assert covered / runs >= 0.92
    assert rejected / runs <= 0.06  # exact: at most 5 %, plus the simulation's error


# ------------------------------------------------------------------------------------------ paired bootstrap


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.floats(-10, 10), st.floats(-10, 10)), min_size=2, max_size=30),
    st.integers(0, 2**32),
)
def test_paired_bootstrap_is_seeded_and_swaps(pairs, seed):
    a, b = (np.array(column) for column in zip(*pairs))
    got = ob.paired_bootstrap(a, b, seed=seed, draws=100)
    assert got == ob.paired_bootstrap(a, b, seed=seed, draws=100)
    swapped = ob.paired_bootstrap(b, a, seed=seed, draws=100)
    ends = (swapped.difference, swapped.low, swapped.high, swapped.p_value)
    assert ends == pytest.approx((-got.difference, -got.high, -got.low, got.p_value), abs=1e-12)
    assert 2 / 101 <= got.p_value <= 1
    assert got.fixed is None and got.broken is None and got.n == len(a)


def test_paired_bootstrap_p_is_add_one_and_one_for_identical_scores():
    a = np.linspace(0, 1, 40)
    assert ob.paired_bootstrap(a, a + 1, draws=999).p_value == pytest.approx(2 / 1000)
    same = ob.paired_bootstrap(a, a, draws=999)
    assert (same.p_value, same.low, same.high, same.excludes_zero) == (1.0, 0.0, 0.0, False)


def test_paired_bootstrap_of_accuracy_agrees_with_mcnemar():
    a, b = table(300, 61, 23, 120)
    exact, drawn = ob.mcnemar_exact(a, b), ob.paired_bootstrap(a, b, draws=3000)
    assert drawn.difference == pytest.approx(exact.difference)
    assert (drawn.low, drawn.high) == pytest.approx((exact.low, exact.high), abs=0.005)


def test_paired_bootstrap_of_perplexity_and_macro_f1():
    rng = np.random.default_rng(2)
    counts = rng.integers(5, 50, size=80)
    base = counts * rng.normal(3.0, 0.2, size=80)
    got = ob.paired_bootstrap(
        ob.token_rows(base, counts),
        ob.token_rows(0.9 * base, counts),
        ob.perplexity,
        draws=500,
        unit="perplexity",
    )
    want = math.exp(0.9 * base.sum() / counts.sum()) - math.exp(base.sum() / counts.sum())
    assert got.difference == pytest.approx(want)
    assert got.high < 0 and got.excludes_zero and "perplexity (95 %" in got.sentence()

    actual = rng.integers(0, 3, size=80)
    guess = rng.integers(0, 3, size=80)
    rows_a, rows_b = ob.label_rows(guess, actual, [0, 1, 2]), ob.label_rows(actual, actual, [0, 1, 2])
    f1 = ob.paired_bootstrap(rows_a, rows_b, ob.macro_f1, draws=500)
    assert f1.difference == pytest.approx(1 - ob.macro_f1(rows_a)) and f1.low > 0


def test_paired_bootstrap_keeps_its_level_and_covers_in_simulation():
    rng, covered, rejected, runs = np.random.default_rng(13), 0, 0, 120
    for seed in range(runs):
        a = rng.normal(size=60)
        b = a + rng.normal(0.2, 1.0, size=60)
        got = ob.paired_bootstrap(a, b, seed=seed, draws=200)
        covered += got.low <= 0.2 <= got.high
        rejected += ob.paired_bootstrap(a, b - 0.2, seed=seed, draws=200).p_value <= 0.05
    assert covered / runs >= 0.87
    assert rejected / runs <= 0.12


# ------------------------------------------------------------------------------------------ the answer


def result(**changes) -> ob.PairedTest:
    fields = {
        "test": "exact McNemar",
        "difference": 0.042,
        "low": 0.021,
        "high": 0.063,
        "p_value": 0.0001,
        "n": 900,
    }
    return ob.PairedTest(**(fields | {"fixed": 61, "broken": 23} | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {},
            "+4.2 points (95 % interval +2.1 to +6.3, exact McNemar p = 0.0001, 61 fixed, 23 broken)",
        ),
        (
            {"low": -0.011, "p_value": 0.2},
            "+4.2 points, within the noise (95 % interval -1.1 to +6.3, exact McNemar p = 0.2000, 61 fixed, 23 broken)",
        ),
        (
            {"p_value": 0.0703, "fixed": None, "broken": None, "test": "paired bootstrap"},
            "+4.2 points, borderline (95 % interval +2.1 to +6.3, paired bootstrap p = 0.0703)",
        ),
        (
            {"difference": -0.00004, "low": -0.1, "p_value": 1e-9, "level": 0.99},
            "+0.0 points, within the noise (99 % interval -10.0 to +6.3, exact McNemar p < 0.0001, "
            "61 fixed, 23 broken)",
        ),
        (
            {"low": 0.0004, "p_value": 0.03},
            "+4.20 points (95 % interval +0.04 to +6.30, exact McNemar p = 0.0300, 61 fixed, 23 broken)",
        ),
        (
            {"unit": "perplexity", "difference": -1.317, "low": -2.0, "high": -0.5, "fixed": None},
            "-1.32 perplexity (95 % interval -2.00 to -0.50, exact McNemar p = 0.0001)",
        ),
    ],
)
def test_sentence(changes, words):
    assert result(**changes).sentence() == words


def test_paired_test_is_frozen_plain_and_checked():
    with pytest.raises(FrozenInstanceError):
        result().n = 3
    assert ob.PairedTest(**json.loads(json.dumps(asdict(ob.mcnemar_exact(*table(5, 3, 1, 2))))))
    for change, words in [
        ({"p_value": 0.0}, "p_value is 0.0"),
        ({"low": 0.5}, "0.5 to 0.063"),
        ({"high": math.inf}, "high is inf"),
        ({"n": 0}, "n is 0"),
        ({"level": 95}, "level is 95.*Did you mean 0.95"),
    ]:
        with pytest.raises(ConfigError, match=words):
            result(**change)


# ------------------------------------------------------------------------------------------ the rest


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=40))
def test_spearman_equals_scipy(pairs):
    x, y = (list(column) for column in zip(*pairs))
    if len(set(x)) < 2 or len(set(y)) < 2:
        return
    assert ob.spearman(x, y) == pytest.approx(spearmanr(x, y)[0], abs=1e-12)
    assert ob.spearman(x, y) == pytest.approx(ob.spearman(y, x), abs=1e-12)


def test_spearman_of_known_and_constant_values():
    # IQ and hours of television: the worked example of Wikipedia's article on Spearman's rank correlation
    iq = [106, 100, 86, 101, 99, 103, 97, 113, 112, 110]
    hours = [7, 27, 2, 50, 28, 29, 20, 12, 6, 17]
    assert ob.spearman(iq, hours) == pytest.approx(-29 / 165)
    assert math.isnan(ob.spearman([1.0, 1.0, 1.0], [1, 2, 3]))
    with pytest.raises(ConfigError, match="all 3 actual values are 2"):
        ob.spearman([1, 2, 3], [2, 2, 2])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ob.accuracy_interval([]), "correct is empty"),
        (lambda: ob.accuracy_interval([1, 2]), r"correct\[1\] is 2, expected True or False"),
        (lambda: ob.accuracy_interval(["yes"]), "correct holds 'yes', expected numbers"),
        (lambda: ob.accuracy_interval([True], level=1.0), "level is 1.0"),
        (lambda: ob.mcnemar_exact([True], [True, False]), "correct_a has 1 examples and correct_b has 2"),
        (lambda: ob.mcnemar_exact([True], [True], level=math.nan), "level is nan"),
        (lambda: ob.bootstrap_interval([1.0, math.nan]), r"per_example\[1\] is nan.*\(1 are not\)"),
        (lambda: ob.bootstrap_interval([[1, 2], [3, math.inf]]), r"per_example\[1, 1\] is inf"),
        (lambda: ob.bootstrap_interval([[1], [2, 3]]), "cannot be made an array"),
        (lambda: ob.bootstrap_interval([1.0]), "a bootstrap needs at least 2 examples, got 1"),
        (lambda: ob.bootstrap_interval([1.0, 2.0], draws=39), "draws is 39.*at least 40 for level 0.95"),
        (lambda: ob.bootstrap_interval([1.0, 2.0], draws=1e3), "draws is 1000.0"),
        (lambda: ob.bootstrap_interval([1.0, 2.0], seed=-1), "seed is -1"),
        (lambda: ob.bootstrap_interval(np.zeros((2, 2, 2))), r"shape \(2, 2, 2\)"),
        (lambda: ob.bootstrap_interval([1.0, 2.0], lambda rows: math.nan), "gave nan on 2 rows"),
        (lambda: ob.paired_bootstrap([1.0, 2.0], [1.0]), "has 2 examples and per_example_b has 1"),
        (lambda: ob.paired_bootstrap([1, 2], [[1, 2], [3, 4]]), r"shape \(2,\) and per_example_b \(2, 2\)"),
        (lambda: ob.paired_bootstrap([1.0], [1.0]), "at least 2 examples"),
        (lambda: ob.token_rows([1.0, 2.0], [3, 0]), r"counts\[1\] is 0"),
        (lambda: ob.token_rows([1.0], [3, 1]), "sums has 1 examples and counts has 2"),
        (lambda: ob.perplexity(ob.token_rows([1e6], [1])), "mean loss of 1e\\+06 nats"),
        (lambda: ob.spearman([1, 2], [1, 2, 3]), "predicted has 2 examples and actual has 3"),
        (lambda: ob.spearman([1], [1]), "at least 2 examples"),
    ],
)
def test_bad_inputs_are_refused_with_their_values(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_all_names_exist_and_importing_is_cheap():
    assert all(hasattr(ob, name) for name in ob.__all__)
    code = "import sys, onebase.statistics; print({'numpy', 'scipy', 'sklearn', 'torch'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"

"""The recommendation, from constructed records."""

from __future__ import annotations

import pytest

from onebase.comparison.advice import Limits, Result, recommend
from onebase.errors import ConfigError
from onebase.statistics import holm, paired_seeds


def result(method: str, value: float, size: int = 1000, p: float = 1.0, best: str = "lora", **more) -> Result:
    """Return a record whose p-value against `best` is p."""
    return Result(method=method, value=value, low=value - 0.01, high=value + 0.01, bytes=size,
                  versus={best: (-0.01, p)}, **more)  # fmt: skip


def test_within_the_noise_the_cheaper_one_is_taken() -> None:
    found = recommend([result("lora", 0.91, 9000), result("bitfit", 0.905, 100, p=0.4)])
    assert found.method == "bitfit" and found.runner_up == "lora" and found.equal == ("lora", "bitfit")
    assert any("below one standard error" in reason for reason in found.reasons)


def test_what_no_test_tells_apart_may_still_be_too_far_to_be_taken() -> None:
    """p = 0.1 is no proof of a difference, and no reason to believe that there is none."""
    found = recommend([result("lora", 0.91, 9000), result("ia3", 0.89, 100, p=0.1), result("dora", 0.908, 1000, p=0.6)])
    assert found.method == "dora" and found.runner_up == "lora" and found.equal == ("lora", "ia3", "dora")


def test_among_files_alike_the_score_decides() -> None:
    records = [result("full", 0.91, 90_000_000, best="full"), result("lora", 0.905, 1300, p=0.5, best="full"),
               result("dora", 0.9, 760, p=0.4, best="full")]  # fmt: skip
    found = recommend(records)
    assert found.method == "lora" and found.runner_up == "dora"
    assert recommend([*records, result("bitfit", 0.89, 100, p=0.4, best="full")]).method == "bitfit"
    no_merge = result("bottleneck", 0.905, 1300, p=0.5, best="full", slowdown=1.3)
    whole = result("full", 0.91, 90_000_000, best="full", mergeable=True)
    found = recommend([whole, no_merge])  # a slower adapter before a model of its own
    assert found.method == "bottleneck" and found.runner_up == "full"
    assert recommend([whole, no_merge], Limits(max_slowdown=1.1)).method == "full"
    slow = [result("prompt", 0.92, 100, slowdown=2.0), result("lora", 0.9, 1300, p=0.5, best="prompt", mergeable=True)]
    assert recommend(slow).method == "lora"


def test_beyond_the_noise_the_better_one_is_taken() -> None:
    found = recommend([result("lora", 0.95, 9000), result("bitfit", 0.85, 100, p=0.001)])
    assert found.method == "lora" and found.equal == ("lora",) and found.front == ("lora", "bitfit")


def test_holm_counts_the_methods() -> None:
    """p = 0.02 alone would be a difference; as the smallest of three it is none."""
    crowd = [result(name, 0.9, 500, p=0.9) for name in "ab"]
    found = recommend([result("lora", 0.92, 9000), result("bitfit", 0.905, 100, p=0.02), *crowd])
    assert "bitfit" in found.equal
    assert recommend([result("lora", 0.92, 9000), result("bitfit", 0.905, 100, p=0.02)]).equal == ("lora",)


def test_limits_exclude_with_reasons() -> None:
    records = [result("lora", 0.9, mergeable=True, share=0.01, slowdown=1.5),
               result("prefix", 0.95, share=0.001, slowdown=1.3)]  # fmt: skip
    assert recommend(records, Limits(must_merge=True)).method == "lora"
    found = recommend(records, Limits(max_share=0.005))
    assert found.method == "prefix" and "1.00%" in found.excluded["lora"]
    assert recommend(records, Limits(max_slowdown=1.1)).method == "lora"  # merged, it costs no time
    none = recommend(records, Limits(max_share=0.0001))
    assert none.method is None and len(none.excluded) == 2 and "No method fits" in none.reasons[0]


def test_a_lower_perplexity_is_better() -> None:
    records = [result("lora", 20.0, higher=False), result("bitfit", 30.0, 10, p=0.001, higher=False)]
    assert recommend(records).method == "lora"


def test_head_only_may_be_the_answer() -> None:
    found = recommend([result("lora", 0.91), result("head only", 0.908, 10, p=0.7)])
    assert found.method == "head only" and "No adapter was shown to help" in found.reasons[-1]


def test_holm_is_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    with pytest.raises(ConfigError, match=r"p_values\[0\]"):
        holm([0.0])


def test_paired_seeds_sees_a_difference_and_none() -> None:
    good, bad = [[1, 1, 1, 0] * 20] * 3, [[1, 0, 0, 0] * 20] * 3
    assert paired_seeds(bad, good).p_value < 0.01 and paired_seeds(bad, good).difference == pytest.approx(0.5)
    assert paired_seeds(good, good).p_value == 1.0
    with pytest.raises(ConfigError, match="expected the same"):
        paired_seeds(good, [[1, 0]])

"""Comparisons: a small one from start to end, gone on with, and what its records say."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import onebase as ob
from onebase.comparison.results import summarize
from onebase.comparison.together import Candidate, OutOfTime, trained_together
from onebase.errors import ConfigError
from onebase.loading import embedded_folder
from onebase.training.kernels import Kernels
from onebase.training.loop import Reporter

GOOD, BAD = ["lovely", "great", "superb", "fine"], ["awful", "poor", "dreadful", "nasty"]
ROWS = [
    {"text": f"The {thing} was {word}.", "label": "good" if word in GOOD else "bad"}
    for thing in ("room", "meal", "film", "book", "phone") for word in GOOD + BAD
]  # fmt: skip


CR = Path(__file__).parents[2] / "shared" / "data" / "cr"
needs_base = pytest.mark.skipif(embedded_folder() is None, reason="the embedded base is not installed (extra 'demo')")


@needs_base
def test_a_small_comparison_and_going_on(tmp_path) -> None:
    base = ob.load_base("minilm", dtype="float32")
    before = [p.clone() for p in base.model.parameters()]
    asked = {"folder": tmp_path, "methods": ["full", "head", "bitfit"], "epochs": 1, "budget": 300.0, "seed": 5}
    found = ob.compare(base, ROWS, seeds=1, **asked)
    assert {r.method for r in found.results} == {"full", "bitfit", "head only"}
    assert all(torch.equal(a, b) for a, b in zip(before, base.model.parameters())) and not base.adapters
    assert all(r.low <= r.value <= r.high and r.high > 0 for r in found.results)
    assert next(r for r in found.results if r.method == "full").bytes > 80_000_000
    assert all(r.seeds == (5,) and r.latency > 0 for r in found.results if r.method != "head only")
    own = next(r for r in found.results if r.method == "head only")
    assert own.parameters == 2 * (384 + 1) and own.bytes == 4 * (own.parameters + 2 * 384)  # with centre and scale
    assert found.advice.method in {r.method for r in found.results}
    with pytest.raises(ConfigError, match="name one more"):
        ob.compare(base, ROWS, folder=tmp_path / "none", methods=["head"])
    with pytest.raises(ConfigError, match="--resume"):
        ob.compare(base, ROWS, seeds=1, **asked)
    lines = (tmp_path / "records.jsonl").read_text()
    again = ob.compare(base, ROWS, seeds=1, resume=True, **asked)
    assert (tmp_path / "records.jsonl").read_text() == lines and again.results == found.results
    with pytest.raises(ConfigError, match="another folder"):
        ob.compare(base, ROWS, seeds=1, resume=True, **(asked | {"epochs": 2}))


@needs_base
def test_limits_and_columns_of_the_command(tmp_path) -> None:
    """Each limit has its own unit, and columns are named as for train; what is wrong is said before any training."""
    from typer.testing import CliRunner

    from onebase.cli.compare import duration, share, times
    from onebase.cli.failures import UsageError
    from onebase.cli.main import app

    assert (share("0.5%"), share("0.005"), share(None)) == (0.005, 0.005, None)
    assert (times("1.1x"), times("2"), duration("5min"), duration("90 s")) == (1.1, 2.0, 300.0, 90.0)
    for read, wrong in ((share, "50000"), (share, "0.5x"), (share, "0"), (times, "1.1%"), (duration, "60")):
        with pytest.raises(UsageError, match=wrong):
            read(wrong)
    (tmp_path / "rows.csv").write_text("\n".join(["text,good,other", *(f"text {i},{i % 2},a{i}" for i in range(40))]))
    asked = ["compare", "-d", str(tmp_path / "rows.csv"), "-m", "lora", "--out", str(tmp_path / "out"), "--epochs", "1"]
    done = CliRunner().invoke(app, [*asked, "--label", "nosuch"])
    assert done.exit_code == 1 and "nosuch" in done.output
    (tmp_path / "rows.csv").write_bytes("text,good\ncafé,1\n".encode("latin-1"))
    done = CliRunner().invoke(app, [*asked, "--label", "nosuch", "--encoding", "latin-1"])
    assert "nosuch" in done.output and "UTF-8" not in done.output
    with pytest.raises(ConfigError, match="limit given with data that is already loaded"):
        ob.compare(ob.load_base("minilm"), ob.load_data(ROWS), folder=tmp_path, limit=20)


@needs_base
@pytest.mark.slow
@pytest.mark.skipif(not CR.is_dir(), reason="the data sets are not there")
def test_a_budget_that_is_too_small_gives_what_was_finished(tmp_path) -> None:
    base = ob.load_base("minilm")
    methods = ["lora", "bitfit", "full"]
    found = ob.compare(base, CR, limit=200, methods=methods, epochs=50, budget=20, folder=tmp_path)
    values = [r.value for r in found.results]
    assert values == sorted(values, reverse=True) and found.advice.method in {r.method for r in found.results}
    given = {r.method: r for r in found.results}
    cut = " ".join(found.cut)
    assert "head only" in given and len(given) > 1 and "to fit the budget" in cut and "ms with all 3 methods" in cut
    for method in methods:  # each has a result, or it is said that there was no time for it
        assert method in given or any("no time for" in s and method in s for s in found.cut), method
        if method in given and given[method].partial:
            assert any("ended before the last epoch" in s and method in s for s in found.cut), method
    kept = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert {r["method"] for r in kept if r["stage"] in ("final", "partial")} == set(given)


@needs_base
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT is a POSIX signal")
def test_ctrl_c_leaves_results_and_resume_goes_on(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "onebase", "compare", "-d", str(tmp_path / "rows.jsonl"), "-b", "minilm", "-m", "bitfit",
        "-m", "prompt(length=3)", "--epochs", "60", "--seeds", "1", "--budget", "2h", "--out", str(out), "--json",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        until = time.monotonic() + 600
        while not (out / "records.jsonl").exists() or '"head only"' not in (out / "records.jsonl").read_text():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        time.sleep(1)  # into the pass of the seed, which begins now
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    early = json.loads(stdout)
    assert all(r["partial"] for r in early["results"] if r["method"] != "head only") and len(early["results"]) == 3
    assert any("interrupted" in sentence for sentence in early["cut"]) and list((out / "passes").iterdir())
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=True)
    whole = json.loads(done.stdout)
    assert not any(r["partial"] for r in whole["results"]) and not list((out / "passes").iterdir())
    curves = {r["method"]: r["curves"][0] for r in whole["results"] if r["method"] != "head only"}
    before = {r["method"]: r["curves"][0] for r in early["results"] if r["method"] != "head only"}
    for method, curve in curves.items():  # it went on: what was there is there again
        assert len(curve) == 61 and curve[: len(before[method]) - 1] == before[method][:-1]


@needs_base
@pytest.mark.slow
def test_ray_gives_the_results_of_one_process(tmp_path) -> None:
    ray = pytest.importorskip("ray", reason="the extra 'ray' is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, of sockets and of what it will change
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
        try:
            base = ob.load_base("minilm", dtype="float32")
            asked = {"methods": ["full", "bitfit", "lora"], "epochs": 1, "seeds": 2, "budget": 600.0}
            here = ob.compare(base, ROWS, folder=tmp_path / "here", **asked)
            there = ob.compare(base, ROWS, folder=tmp_path / "there", ray=True, **asked)
        finally:
            ray.shutdown()
    assert {r.method: len(r.values) for r in there.results} == {"full": 2, "bitfit": 2, "lora": 2, "head only": 1}
    assert {r.method: r.values for r in there.results} == {r.method: r.values for r in here.results}
    assert all(r.latency > 0 and not r.partial for r in there.results)


def test_ray_is_named_where_it_is_missing(tmp_path) -> None:
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from onebase.comparison.on_ray import on_ray\n"
        "try:\n    on_ray(None).__enter__()\n"
        "except Exception as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'onebase[ray]'" in done.stdout


class Ends(Reporter):
    """Ends a pass after so many steps of its first candidate."""

    def __init__(self, rounds: int):
        self.left = rounds

    def step(self, *_: float) -> None:
        self.left -= 1
        if self.left < 0:
            raise OutOfTime("over")


@needs_base
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_pass_that_ended_early_counts_and_goes_on_to_the_same_bits(tmp_path, method) -> None:
    base = ob.load_base("minilm", dtype="float32")
    before = [p.clone() for p in base.model.parameters()]
    data = ob.load_data(ROWS)
    methods = [method] if method == "full" else [method, "bitfit", "prompt(length=3)"]
    candidates = [Candidate(method=m, lr=1e-4, seed=1) for m in methods]
    steps = -(-len(data.train) // 8)

    def tensors(found) -> list:
        return [t.clone() for run in found.runs for t in run.adapter.tensors().values()]

    def trained(report: Reporter, place=None):
        return trained_together(base, data, candidates, 3, report, place=place, kernels=Kernels(base, None, None),
                                batch_size=8)  # fmt: skip

    with trained(Reporter()) as found:
        assert found.stopped is None and found.rows == 3 * len(data.train)
        whole, rows = tensors(found), found.rows
    place = tmp_path / "pass.safetensors"
    with trained(Ends(steps + 1), place) as found:  # in the second step of the second epoch
        assert isinstance(found.stopped, OutOfTime) and place.exists()
        assert found.rows == len(data.train) + 16
        for run in found.runs:
            epochs = [entry["epoch"] for entry in run.state.history.epochs]
            assert epochs == [0, 1, round(1 + 2 / steps, 3)] and "accuracy" in run.state.history.epochs[-1]
    assert all(torch.equal(a, b) for a, b in zip(before, base.model.parameters())) and not base.adapters
    with trained(Reporter(), place) as found:
        assert found.stopped is None and found.rows == rows
        assert all(torch.equal(a, b) for a, b in zip(whole, tensors(found), strict=True))
    assert not place.exists()
    with trained(Ends(3 * steps - 1), place) as found:  # time ends with the last step: nothing is left to do
        assert found.stopped is None and not place.exists()
        assert all(torch.equal(a, b) for a, b in zip(whole, tensors(found), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, base.model.parameters())) and not base.adapters


def record(method: str, seed: int, rows: list[float]) -> dict:
    """Return the record of a run that was right where rows are 1."""
    return {"stage": "final", "method": method, "seed": seed, "metric": "accuracy", "value": sum(rows) / len(rows),
            "rows": rows, "parameters": 1, "share": 0.1, "bytes": 4, "seconds": 1.0, "latency": 0.1, "throughput": 9.0,
            "slowdown": 1.0, "mergeable": True, "lr": 1e-3, "curve": []}  # fmt: skip


def test_records_become_results() -> None:
    records = [record("lora", s, [1, 1, 1, 0] * 20) for s in range(3)]
    records += [record("bitfit", s, [1, 0, 0, 0] * 20) for s in range(3)]
    one, two = summarize(records)
    assert (one.method, one.value, len(one.values)) == ("lora", 0.75, 3) and two.method == "bitfit"
    assert one.low < 0.75 < one.high
    difference, p = two.versus["lora"]
    assert difference == pytest.approx(-0.5) and p < 0.01


def test_statistics_match_scipy_on_stored_predictions() -> None:
    """The interval of one run's accuracy, and the paired test of two, against scipy's bootstrap and sign flips."""
    import numpy as np
    from scipy import stats

    from onebase.statistics import paired_seeds, seeds_interval

    draw = np.random.default_rng(1)
    good, bad = (draw.random(400) < 0.85).astype(float), (draw.random(400) < 0.78).astype(float)
    low, high = seeds_interval([good], draws=4000)
    theirs = stats.bootstrap((good,), np.mean, method="percentile", n_resamples=4000, rng=2).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    test = paired_seeds([bad], [good], draws=4000)
    permuted = stats.permutation_test((good, bad), lambda a, b: np.mean(a) - np.mean(b), permutation_type="samples",
                                      n_resamples=4000, rng=2)  # fmt: skip
    assert test.difference == pytest.approx(permuted.statistic)
    assert test.p_value == pytest.approx(permuted.pvalue, abs=0.03)


def test_calibration_is_that_of_the_paper() -> None:
    from onebase.statistics import calibration

    error, bins = calibration([0.95, 0.95, 0.95, 0.95, 0.55, 0.55], [1, 1, 1, 0, 1, 0], 10)
    assert error == pytest.approx(4 / 6 * 0.2 + 2 / 6 * 0.05)
    assert [b[2] for b in bins] == [2, 4]
    with pytest.raises(ConfigError, match="0 to 1"):
        calibration([1.5], [1])


def test_a_partial_run_counts_until_its_final_one_is_there() -> None:
    early = record("lora", 0, [1, 0] * 20) | {"stage": "partial"}
    assert summarize([early])[0].partial and summarize([early])[0].value == 0.5
    done = record("lora", 0, [1, 1] * 20)
    assert not summarize([early, done])[0].partial and summarize([early, done])[0].value == 1.0
    further = record("lora", 1, [0, 0] * 20) | {"stage": "partial"}  # part of a run says less than a whole one
    assert summarize([done, further])[0].values == (1.0,)


def test_labels_give_confusion_and_rows_fixed_and_broken() -> None:
    rows = {"labels": ["a", "b"], "gold": [0, 1, 1, 0], "texts": list("wxyz")}
    own = record("head only", 0, [1, 0, 1, 1]) | {"predicted": [0, 0, 1, 0], "confidence": [0.9] * 4}
    new = record("lora", 0, [1, 1, 0, 1]) | {"predicted": [0, 1, 0, 0], "confidence": [0.9] * 4}
    found = next(r for r in summarize([own, new], rows) if r.method == "lora")
    assert found.confusion == ((2, 0), (1, 1)) and (found.fixed, found.broken) == (1, 1)
    assert found.examples["fixed"][0]["text"] == "x" and found.examples["broken"][0]["text"] == "y"
    assert found.ece == pytest.approx(0.15)

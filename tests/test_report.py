"""The report: everything in one file, nothing from elsewhere, every number in the JSON."""

from __future__ import annotations

import csv
import json
import re

import pytest
from typer.testing import CliRunner

from onebase.cli.main import app

pytest.importorskip("jinja2", reason="the extra 'report' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
CURVE = [{"epoch": 0, "accuracy": 0.7}, {"epoch": 1, "accuracy": 0.9}]
RESULT = {
    "method": "lora", "value": 0.91, "low": 0.88, "high": 0.94, "values": [0.91], "parameters": 1000, "share": 0.01,
    "bytes": 4000, "seconds": 3.0, "latency": 0.01, "throughput": 200.0, "slowdown": 1.2, "mergeable": True,
    "lr": 0.002, "curves": [CURVE], "total_bytes": 90, "memory": 5_000_000, "merged_latency": 0.009, "forgetting": 0.02,
    "forgetting_measure": "distance", "ece": 0.05, "calibration": [[0.9, 0.85, 40], [0.6, 0.5, 10]], "p_best": None,
    "p_full": 0.6, "fixed": 3, "broken": 1, "confusion": [[20, 5], [4, 21]],
    "examples": {"fixed": [{"text": "<b>fine</b>", "label": "good", "base": "bad", "method": "good"}], "broken": []},
}  # fmt: skip
FOUND = {
    "base": "b", "data": "<script>reviews</script>", "kind": "classification", "metric": "accuracy",
    "cut": ["no seed 2"], "labels": ["bad", "good"], "tasks": 20, "command": "onebase compare -d reviews.csv",
    "settings": {"seeds": 3, "epochs": 5}, "versions": {"torch": "2.x"}, "machine": {"cores": 2},
    "results": [RESULT, RESULT | {"method": "bitfit", "bytes": 100, "value": 0.87}],
    "advice": {"method": "lora", "runner_up": "bitfit", "reasons": ["It is better."],
               "excluded": {"prompt": "slow"},
               "front": ["lora", "bitfit"], "equal": ["lora"]},
}  # fmt: skip


def alone(page: str) -> bool:
    """Whether a page needs nothing from elsewhere."""
    found = re.search(r"https?:|//[a-z]|\bsrc=|@import|<link|<image|url\((?!#)", page)
    return not found and all(href.startswith("#") for href in re.findall(r'href="([^"]*)"', page))


def test_the_page_needs_nothing_else(tmp_path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(FOUND))
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    assert alone(page) and "<script" not in page and "<b>fine" not in page
    for said in ("It is better.", "no seed 2", "onebase compare -d reviews.csv", "20 tasks", "&lt;b&gt;fine", "2.x",
                 "Confusion of lora", "Calibration of lora", "Score against latency", "Score against memory"):  # fmt: skip
        assert said in page, said
    assert page.count("<svg") == 8 and "currentColor" in page and "prefers-color-scheme: dark" in page
    assert json.loads((tmp_path / "report.json").read_text()) == FOUND
    with (tmp_path / "report.csv").open() as stream:
        assert [(row["data"], row["method"]) for row in csv.DictReader(stream)][1] == (FOUND["data"], "bitfit")


def test_every_drawn_number_is_in_the_json(tmp_path) -> None:
    """What a figure draws is made of the JSON alone: another number there draws another figure."""
    from onebase.comparison.figures import figures_of

    drawn = figures_of(FOUND)
    for key, title in (("latency", "latency"), ("seconds", "training time"), ("memory", "memory in training")):
        other = FOUND | {"results": [FOUND["results"][0] | {key: 3 * FOUND["results"][0][key]}, FOUND["results"][1]]}
        changed = figures_of(json.loads(json.dumps(other)))
        assert changed[f"Score against {title}"] != drawn[f"Score against {title}"]
    assert ">20<" in drawn["Confusion of lora"] and "0.050" in drawn["Calibration of lora"]


def test_several_runs_share_a_page(tmp_path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "comparison.json").write_text(json.dumps(FOUND | {"data": f"data-{name}"}))
    places = [str(tmp_path / name) for name in ("one", "two")]
    done = CliRunner().invoke(app, ["report", *places, "--out", str(tmp_path / "both")])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "both" / "report.html").read_text()
    assert alone(page) and "data-one" in page and "data-two" in page and page.count("<section>") == 2
    assert len(json.loads((tmp_path / "both" / "report.json").read_text())) == 2


def test_a_folder_without_comparison_is_named(tmp_path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2 and "comparison.json" in done.stderr

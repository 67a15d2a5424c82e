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
    "lr": 0.002, "curves": [CURVE],
}  # fmt: skip
FOUND = {
    "base": "b", "data": "<script>reviews</script>", "kind": "classification", "metric": "accuracy",
    "cut": ["no seed 2"],
    "results": [RESULT, RESULT | {"method": "bitfit", "bytes": 100, "value": 0.87}],
    "advice": {"method": "lora", "runner_up": "bitfit", "reasons": ["It is better."],
               "excluded": {"prompt": "slow"},
               "front": ["lora", "bitfit"], "equal": ["lora"]},
}  # fmt: skip


def test_the_page_needs_nothing_else(tmp_path) -> None:
    (tmp_path / "comparison.json").write_text(json.dumps(FOUND))
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|\bsrc=|@import|<link", page)
    assert all(href.startswith("#") for href in re.findall(r'href="([^"]*)"', page))
    assert page.count("<svg") == 2 and "<script" not in page and "It is better." in page and "no seed 2" in page
    assert json.loads((tmp_path / "report.json").read_text()) == FOUND
    with (tmp_path / "report.csv").open() as stream:
        assert [row["method"] for row in csv.DictReader(stream)] == ["lora", "bitfit"]


def test_a_folder_without_comparison_is_named(tmp_path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2 and "comparison.json" in done.stderr

"""Every reproduction runs, says whether its finding holds, and makes no row twice."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

from onebase.loading import embedded_folder

pytest.importorskip("matplotlib", reason="the extra 'report' is not installed")
PLACE = Path(__file__).parents[1] / "benchmarks" / "reproduce"
DATA = Path(__file__).parents[2] / "shared" / "data"
TRAINED = ["--data", str(DATA), "--limit", "24", "--seeds", "1", "--epochs", "1"]
SMALL = {
    "adapter_size": [*TRAINED, "--sizes", "1", "64"],
    "many_tasks": [*TRAINED, "--tasks", "cr", "mrpc"],
    "initial_scale": [*TRAINED, "--scales", "1e-7", "1e-2", "1"],
    "layer_removal": TRAINED,
    "latency": ["--batches", "1", "4", "--lengths", "8", "--seeds", "1", "--rounds", "2"],
    "rank": [*TRAINED, "--ranks", "1", "8"],
    "prefix_length": [*TRAINED, "--lengths", "1", "8", "--examples", "12"],
    "prompt": [*TRAINED, "--lengths", "1", "5"],
    "capacity": [*TRAINED, "--tasks", "cr", "trec6"],
    "lowest_layers": TRAINED,
}


def test_every_reproduction_is_tried() -> None:
    assert {path.stem for path in PLACE.glob("*.py")} == {*SMALL, "harness"}


@pytest.mark.slow
@pytest.mark.skipif(embedded_folder() is None, reason="the embedded base is not installed (extra 'demo')")
@pytest.mark.skipif(not DATA.is_dir(), reason="the data sets are not there")
@pytest.mark.parametrize("name", SMALL)
def test_it_runs_and_goes_on(name, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(PLACE)
    monkeypatch.setattr(sys, "argv", [f"benchmarks/reproduce/{name}.py", *SMALL[name], "--out", str(tmp_path)])
    runpy.run_path(str(PLACE / f"{name}.py"), run_name="__main__")
    (kept,) = tmp_path.glob("*.json")
    rows = json.loads(kept.read_text())["rows"]
    assert rows and not any("failed" in row for row in rows)
    text = kept.with_suffix(".md").read_text()
    assert (
        "**Found in the paper.**" in text
        and "arXiv" in text
        and " ".join(SMALL[name][-2:]) in text
        and str(DATA) not in text
    )
    assert re.search(r"^- (holds|does not hold|cannot be said|also measured): ", text, re.MULTILINE)
    assert kept.with_suffix(".svg").read_text().lstrip().startswith("<?xml")
    said = capsys.readouterr().out
    runpy.run_path(str(PLACE / f"{name}.py"), run_name="__main__")
    assert json.loads(kept.read_text())["rows"] == rows  # nothing was made again
    assert len(capsys.readouterr().out) < len(said)

"""What all reproductions share: jobs in joint passes, finished rows kept in a JSON file, a figure, a text with verdict.

A reproduction states a paper's finding, measures the same here and says whether it holds at this size. It writes
``NAME.json`` (every finished row), ``NAME.svg`` and ``NAME.md``. Rows that are in the JSON already are not made again,
so a run that was stopped goes on; rows of other settings (`--limit`, `--epochs`) stay beside them and do not count.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import onebase as ob
from onebase.statistics import paired_seeds
from onebase.training.full import RATES, trained_whole
from onebase.training.many import Failed

FULL = "full"
COLOURS = ("#3b7dd8", "#d9534f", "#4c9f50", "#e69f00", "#9467bd", "#17a2b8", "#c2549d", "#7f7f7f")
Row = dict[str, Any]
MARKS: dict[Any, str] = {True: "holds", False: "does not hold", None: "cannot be said"}
ALSO = "also measured"


@dataclass(frozen=True)
class Study:
    """A reproduction.

    Attributes:
        name: of its files.
        title: of its text.
        finding: what the paper found, with its source.
        note: how what is measured here differs from the paper.
    """

    name: str
    title: str
    finding: str
    note: str = ""


@dataclass(frozen=True)
class Asked:
    """One run to make.

    Attributes:
        facts: what tells its row from others: task, method, what is varied.
        method: what is trained; 'full' for the whole base.
        seed: of start, order and dropout.
        settings: of training.
    """

    facts: Mapping[str, Any]
    method: Any
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Whether a finding holds here.

    Attributes:
        holds: yes, no, or None where it cannot be said; a word where the paper says nothing of it.
        words: with the numbers that say so.
    """

    holds: bool | str | None
    words: str


def parser(study: Study, task: str = "cr", epochs: int = 5) -> argparse.ArgumentParser:
    """Return the options that every reproduction has."""
    found = argparse.ArgumentParser(description=f"{study.title}. {study.finding}")
    found.add_argument("--data", type=Path, required=True, help="folder of data sets, each a folder of splits")
    found.add_argument("--task", default=task, help="name of the data set")
    found.add_argument("--base", default="minilm")
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--limit", type=int, help="most rows of each split")
    found.add_argument("--epochs", type=int, default=epochs)
    found.add_argument("--together", type=int, default=12, help="jobs of a joint pass")
    found.add_argument("--out", type=Path, default=Path("docs/results"))
    return found


class Bench:
    """A reproduction at work.

    Args:
        study: what it is.
        given: the options.
    """

    def __init__(self, study: Study, given: argparse.Namespace):
        self.study, self.given = study, given
        self.path = given.out / f"{study.name}.json"
        known = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {"rows": []}
        self.all: list[Row] = known["rows"]
        self.base = ob.load_base(given.base)
        self.common = {"base": self.base.id, "limit": given.limit, "epochs": given.epochs}
        self._data: dict[str, Any] = {}

    @property
    def rows(self) -> list[Row]:
        """The rows of these settings."""
        return [row for row in self.all if all(row.get(key) == value for key, value in self.common.items())]

    def find(self, **facts: Any) -> list[Row]:
        """Return the rows with these facts, those that failed left out."""
        return [r for r in self.rows if "failed" not in r and all(r.get(k) == v for k, v in facts.items())]

    def has(self, facts: Mapping[str, Any]) -> bool:
        """Whether a row with these facts is there, finished or failed."""
        return any(all(row.get(key) == value for key, value in facts.items()) for row in self.rows)

    def add(self, *rows: Row) -> None:
        """Keep rows, all or none; the file is whole at any time."""
        self.all += [{**self.common, **row} for row in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        work = self.path.with_suffix(".new")
        work.write_text(json.dumps({"study": self.study.name, "rows": self.all}, indent=0) + "\n", encoding="utf-8")
        work.replace(self.path)
        for row in rows:
            print(json.dumps({key: value for key, value in row.items() if key != "correct"}), flush=True)

    def data(self, task: str | None = None, rows: int | None = None) -> Any:
        """Return a data set, its training rows cut to `rows`."""
        from dataclasses import replace

        from onebase.data.rows import digest_of
        from onebase.data.splits import sample

        name = task or self.given.task
        if name not in self._data:
            self._data[name] = ob.load_data(self.given.data / name, limit=self.given.limit)
        found = self._data[name]
        if rows is None or rows >= len(found.train):
            return found
        splits = {**found.splits, "train": sample(found.train, rows, 0, False, found.kind)}
        return replace(found, train=splits["train"], digest=digest_of(found.kind, splits))

    # -- training --------------------------------------------------------------------------------------------------

    def train(
        self, data: Any, asked: Iterable[Asked], then: Callable[[Asked, Any], Iterable[Row]] | None = None
    ) -> None:
        """Make the runs that are not there yet: adapters in joint passes, the whole base one by one.

        Args:
            data: what they are trained on.
            asked: the runs.
            then: gives further rows of a run while its adapter is attached.
        """
        todo = [a for a in asked if not self.has({**a.facts, "seed": a.seed})]
        adapters = [a for a in todo if a.method != FULL]
        for start in range(0, len(adapters), self.given.together):
            self._together(data, adapters[start : start + self.given.together], then)
        for one in todo:
            if one.method == FULL:
                self._whole(data, one)

    def _together(self, data: Any, some: Sequence[Asked], then: Any) -> None:
        began = time.perf_counter()
        jobs = [
            ob.Job(data, a.method, f"job{i}", seed=a.seed, epochs=self.given.epochs, **a.settings)
            for i, a in enumerate(some)
        ]
        runs = ob.train_many(self.base, jobs, save=False)
        seconds = (time.perf_counter() - began) / len(some)
        for one, run in zip(some, runs, strict=True):
            if isinstance(run, Failed):
                self.add({**one.facts, "seed": one.seed, "failed": str(run.error)})
                continue
            further = list(then(one, run)) if then else []
            self.add(self._row(one, run, seconds), *further)
            self.base.remove(run.name)

    def _whole(self, data: Any, one: Asked) -> None:
        began = time.perf_counter()
        settings = {"lr": RATES[1], **one.settings}
        with trained_whole(self.base, data, seed=one.seed, epochs=self.given.epochs, **settings) as run:
            self.add(self._row(one, run, time.perf_counter() - began))

    def _row(self, one: Asked, run: Any, seconds: float) -> Row:
        correct = run.scores.adapter.correct if run.metric == "accuracy" else None
        return {
            **one.facts, "seed": one.seed, "metric": run.metric, "value": run.value, "own": run.base_value,
            "parameters": run.parameters, "share": run.share, "lr": run.settings.lr, "best": run.history.best,
            "seconds": round(seconds, 1),
            "correct": None if correct is None else "".join("01"[bool(c)] for c in correct),
        }  # fmt: skip

    # -- what came out ---------------------------------------------------------------------------------------------

    def mean(self, **facts: Any) -> float | None:
        """Return the mean over seeds, None where there is no row."""
        values = [row["value"] for row in self.find(**facts)]
        return statistics.fmean(values) if values else None

    def apart(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float, float] | None:
        """Return the second's mean score less the first's, with a 95 % interval; None where rows are missing.

        Accuracies are paired over seeds and examples (`onebase.statistics.paired_seeds`); other metrics over seeds,
        with Student's t.
        """
        a, b = self.find(**one), self.find(**other)
        if not a or not b:
            return None
        if all(row["correct"] for row in (*a, *b)):
            test = paired_seeds(*([[float(c) for c in row["correct"]] for row in rows] for rows in (a, b)))
            return test.difference, test.low, test.high
        pairs = [(x["value"], y["value"]) for x in a for y in b if x["seed"] == y["seed"]]
        differences = [y - x for x, y in pairs]
        middle = statistics.fmean(differences)
        if len(differences) < 2:
            return middle, -math.inf, math.inf
        from scipy.stats import t

        reach = t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
        return middle, middle - reach, middle + reach

    def write(self, verdicts: Sequence[Verdict], table: Sequence[Row], figure: Any) -> None:
        """Write the figure and the text.

        Args:
            verdicts: on each part of the finding.
            table: rows of values to show, all with the same keys.
            figure: a matplotlib figure.
        """
        folder = self.given.out
        figure.savefig(folder / f"{self.study.name}.svg", format="svg", metadata={"Date": None})
        said = [f"{MARKS.get(v.holds, v.holds)}: {v.words}" for v in verdicts]
        heads = list(table[0]) if table else []
        lines = [
            f"# {self.study.title}", "", f"**Found in the paper.** {self.study.finding}", "",
            *([f"**Differs here.** {self.study.note}", ""] if self.study.note else []),
            "**Here.**", "", *(f"- {sentence}" for sentence in said), "",
            f"![{self.study.title}]({self.study.name}.svg)", "",
            " | ".join(["", *heads, ""]).strip(), " | ".join(["", *("---" for _ in heads), ""]).strip(),
            *(" | ".join(["", *(_shown(row[key]) for key in heads), ""]).strip() for row in table), "",
            f"Base {self.base.id}; {self.given.seeds} seeds; "
            + (f"at most {self.given.limit} rows of each split; " if self.given.limit else "")
            + (f"at most {self.given.epochs} epochs; " if self.given.epochs else "")
            + f"torch {torch.__version__}, {torch.get_num_threads()} threads.",
            "", "```text", command(), "```", "",
        ]  # fmt: skip
        (folder / f"{self.study.name}.md").write_text("\n".join(lines), encoding="utf-8")
        print("\n".join(said))


def command() -> str:
    """Return the command that runs, without where this machine keeps things."""
    words, places = [f"benchmarks/reproduce/{Path(sys.argv[0]).name}"], {"--data": "DATA", "--out": "RESULTS"}
    for before, word in zip(sys.argv, sys.argv[1:]):
        words.append(places.get(before, word))
    return shlex.join(["python", *words])


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def lower(found: tuple[float, float, float] | None) -> bool | None:
    """Whether the second of two is worse: None where the interval holds no difference, or nothing was measured."""
    return None if found is None or found[1] <= 0 <= found[2] else found[0] < 0


def higher(found: tuple[float, float, float] | None) -> bool | None:
    """Whether the second of two is better, as `lower`."""
    return None if found is None or found[1] <= 0 <= found[2] else found[0] > 0


def within(found: tuple[float, float, float] | None) -> str:
    """Say a difference with its interval."""
    if found is None:
        return "not measured"
    middle, low, high = found
    return f"{100 * middle:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"


def plot(
    series: Mapping[str, Sequence[tuple[float, Sequence[float]]]], x: str, y: str, *, log: bool = True,
    lines: Mapping[str, float | None] | None = None,
) -> Any:  # fmt: skip
    """Draw means over seeds against a number, with the seeds' range.

    Args:
        series: name -> (x, values of the seeds).
        x, y: titles of the axes.
        log: whether x is drawn in powers.
        lines: name -> a level to compare with.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    for number, (name, points) in enumerate(series.items()):
        points = sorted((place, list(values)) for place, values in points if values)
        colour, means = COLOURS[number % len(COLOURS)], [statistics.fmean(values) for _, values in points]
        places = [place for place, _ in points]
        axes.plot(places, means, marker="o", color=colour, label=name)
        axes.fill_between(places, [min(v) for _, v in points], [max(v) for _, v in points], color=colour, alpha=0.15)
    for number, (name, level) in enumerate((lines or {}).items()):
        if level is not None:
            axes.axhline(level, color=COLOURS[-1 - number % len(COLOURS)], linestyle="--", label=name)
    if log:
        axes.set_xscale("log")
    axes.set(xlabel=x, ylabel=y)
    axes.legend(fontsize=8, framealpha=0)
    return figure

"""`onebase predict --split`: the passages of one document that an adapter flags."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.cli.failures import UsageError, misspelt
from onebase.cli.output import Output, count, percent, plain, shorten
from onebase.errors import DataError

if TYPE_CHECKING:
    from onebase.base import Prediction
    from onebase.data import Passage
    from onebase.store import AdapterConfig

DEFAULT_THRESHOLD = 0.5
WIDTH = 80
FIELDS: list[str] = ["adapter", "label", "probability", "index", "line", "start", "end", "text"]


@dataclass
class Found:
    """What was flagged.

    Attributes:
        base: the base's id.
        passages: how many the document has.
        flagged: one dictionary per adapter and passage, with FIELDS, in the order of the document.
        flags: reference -> labels that count as flagged.
        thresholds: reference -> least probability; 0 where every passage is listed.
    """

    base: str
    passages: int
    flagged: list[dict[str, Any]]
    flags: dict[str, list[str]]
    thresholds: dict[str, float]

    def show(self, out: Output, write: Path | None) -> None:
        """Print or write the flagged passages."""
        if write is not None:
            self._write(write)
            out.note(f"wrote {count(len(self.flagged), 'flagged passage')} to {write}")
        if out.as_json:
            facts = {"base": self.base, "passages": self.passages, "flags": self.flags, "thresholds": self.thresholds}
            out.document(facts | ({"flagged": self.flagged} if write is None else {"out": write}))
            return
        if write is None:
            rows = [
                [
                    f["adapter"],
                    f["label"],
                    percent(f["probability"]),
                    f["index"],
                    f["line"],
                    f"{f['start']}-{f['end']}",
                    shorten(f["text"], WIDTH),
                ]
                for f in self.flagged
            ]
            names = ("adapter", "label", "probability", "index", "line", "characters", "text")
            out.table(names, rows, right=("probability", "index", "line"))
        out.note(f"{count(len(self.flagged), 'flagged passage')}, out of {count(self.passages, 'passage')}")

    def _write(self, path: Path) -> None:
        import csv

        with path.open("w", encoding="utf-8", newline="", errors="backslashreplace") as stream:
            if path.suffix.lower() == ".jsonl":
                stream.writelines(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in self.flagged)
                return
            writer = csv.DictWriter(stream, FIELDS)
            writer.writeheader()
            writer.writerows(self.flagged)


def predict_passages(
    texts: Sequence[str] | None,
    file: Path | None,
    refs: list[str],
    by: str,
    flag: list[str],
    threshold: float | None,
    base_name: str | None,
    device: str | None,
    dtype: str | None,
    batch_size: int,
    out: Output,
) -> Found:
    """Cut a document, ask every adapter about every passage, and keep what is flagged."""
    from onebase.cli.bases import open_adapters
    from onebase.cli.predict import ask
    from onebase.data import split_passages
    from onebase.store import Store

    if by not in ("sentences", "paragraphs"):
        raise misspelt("way to --split", by, ("sentences", "paragraphs"))
    document = _document(texts, file)
    passages = split_passages(document, by)  # type: ignore[arg-type]
    if not passages:
        raise DataError("the document holds no text")
    flags, in_full = choose_flags({ref: Store().resolve(ref).config for ref in refs}, flag, out)
    default = {ref: 0.0 if ref in in_full else DEFAULT_THRESHOLD for ref in refs}
    thresholds = default if threshold is None else dict.fromkeys(refs, threshold)
    base, routes = open_adapters(refs, base_name, device, dtype, out)
    answers = ask(base, routes, [p.text for p in passages], None, batch_size)
    flagged = []
    for i, passage in enumerate(passages):
        for ref, predictions in answers.items():
            best = predictions[i]
            for label in _chosen(best, flags[ref], thresholds[ref], threshold is None):
                flagged.append(_place(ref, label, best.probabilities[label], passage, document))
    cut = sum(p.cut > 0 for found in answers.values() for p in found)
    if cut:
        out.note(f"{count(cut, 'passage')} longer than the adapter reads, and cut")
    return Found(base.id, len(passages), flagged, flags, thresholds)


def _chosen(best: Prediction, flags: list[str], threshold: float, by_default: bool) -> list[str]:
    """Return the labels that a passage is listed under: one, or of several those that reach the threshold."""
    chances = {label: best.probabilities[label] for label in flags}
    if best.labels is not None:  # each label has a threshold of its own
        return [label for label in flags if (label in best.labels if by_default else chances[label] >= threshold)]
    label = max(chances, key=chances.__getitem__)
    return [label] if chances[label] >= threshold else []


def choose_flags(
    configs: dict[str, AdapterConfig], asked: list[str], out: Output
) -> tuple[dict[str, list[str]], set[str]]:
    """Decide which labels of each adapter count as flagged.

    The labels asked for; else the rarer of two labels where the training counts are known; else every label.

    Returns:
        reference -> labels, and the references of which every passage is listed, because nothing better is known.
    """
    flags: dict[str, list[str]] = {}
    in_full: set[str] = set()
    unused = set(asked)
    for ref, config in configs.items():
        labels = [str(label) for label in config.task.get("labels") or ()]
        if not labels:
            raise UsageError(f"adapter {ref!r} has no labels to flag: it is for {config.task.get('kind')}")
        if asked:
            flags[ref] = [label for label in labels if label in asked]
            unused -= set(labels)
            if not flags[ref]:
                raise misspelt(f"label of adapter {ref!r}:", asked[0], labels)
            continue
        if config.task.get("kind") == "multilabel":
            flags[ref] = labels
            out.note(f"{ref}: flagging every label that reaches its own threshold; choose labels with --flag")
            continue
        rare = _rarer(labels, config.provenance.get("label_counts"))
        flags[ref] = labels if rare is None else [rare]
        if rare is not None:
            out.note(f"{ref}: flagging {rare!r}, the rarer label in training; choose with --flag LABEL")
        else:
            in_full.add(ref)
            out.note(f"{ref}: listing every passage with its label; choose labels with --flag ({', '.join(labels)})")
    if unused:
        raise misspelt("--flag", sorted(unused)[0], {label for c in configs.values() for label in c.task["labels"]})
    return flags, in_full


def _rarer(labels: list[str], counts: Any) -> str | None:
    if len(labels) != 2 or not isinstance(counts, dict) or not all(isinstance(counts.get(x), int) for x in labels):
        return None
    first, second = labels
    if counts[first] == counts[second]:
        return None
    return min(labels, key=counts.__getitem__)


def _document(texts: Sequence[str] | None, file: Path | None) -> str:
    import sys

    from onebase.cli.texts import STDIN, read_document

    if texts and file is not None:
        raise UsageError(f"both a text and --file {file} are given: pass one of them")
    if texts and texts[0] != STDIN:
        return texts[0]
    if file is not None and file.suffix.lower() in (".csv", ".tsv", ".jsonl"):
        raise UsageError(f"--split takes one document of plain text, not a table such as {file.name}")
    if file is None and not texts and sys.stdin.isatty():
        raise UsageError("nothing to read: pass a text, --file FILE, or pipe a document to standard input")
    return read_document(file or Path(STDIN))


def _place(ref: str, label: str, probability: float, passage: Passage, document: str) -> dict[str, Any]:
    """Say where a passage is: its index from 0, its line from 1, its characters as in document[start:end]."""
    return {
        "adapter": ref,
        "label": label,
        "probability": probability,
        "index": passage.index,
        "line": document.count("\n", 0, passage.start) + 1,
        "start": passage.start,
        "end": passage.end,
        "text": passage.text,
    }

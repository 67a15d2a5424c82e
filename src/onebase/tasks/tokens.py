"""Token classification: a tag per word. BIO tags mark entities, which are what counts; any other tags count by word.

A word is tagged at its first token (Devlin et al. 2019, arXiv 1810.04805, section 5.3). A long text is read in windows
that overlap; each word counts once, in the window where it has most context, in the loss as in the score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.encode import IGNORED, OVERLAP, Encoded, encode_windows
from onebase.errors import ConfigError, DataError, UnsupportedError
from onebase.heads import LinearHead
from onebase.statistics import bootstrap_interval
from onebase.tasks.frozen import fit_classes, row_states, some_rows
from onebase.tasks.metrics import metric_of
from onebase.tasks.registry import register_task
from onebase.tasks.tagging import (
    OUTSIDE,
    bio_tags,
    entities,
    entity_counts,
    find_words,
    is_bio,
    place_words,
    tag_counts,
    words_of_span,
)
from onebase.tasks.task import Examples, Found, Losses, Prediction, Scores, Span, Task, choose_option

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data, Rows

# Words that the base's own head is fitted on, and as many of validation that choose its penalty: whole texts in a
# seeded order until there are so many. Three penalties then take 5 seconds on one core (384 features, 9 tags).
BASE_WORDS = 12_000
PROBLEMS_SHOWN = 10


@register_task
class Tokens(Task):
    """A tag per word."""

    kind: ClassVar[str] = "tokens"
    summary: ClassVar[str] = "a tag per word: entities, parts of speech"
    labelled: ClassVar[bool] = True
    places: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Any]] = {"windows": True, "overlap": OVERLAP, "scheme": "auto"}
    learned: ClassVar[tuple[str, ...]] = ("metric",)

    def check_base(self, base: Base) -> None:
        """Require a tokenizer that says where its tokens are."""
        if not getattr(base.tokenizer, "is_fast", False):
            raise UnsupportedError(f"{self.kind} needs a fast tokenizer, which tells where its tokens are in the text")

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Decide what the tags mean, list them, and choose the metric."""
        how = choose_option("scheme", spec["scheme"], ("auto", "bio", "plain"))
        rows = data.train
        spans = rows.get("spans")
        seen = set() if spans is not None else {tag for tags in rows["tags"] for tag in tags}
        bio = spans is not None or is_bio(seen)
        if (how == "bio" and not bio) or (how == "plain" and spans is not None):
            shown = "spans, which are entities" if spans is not None else f"tags such as {sorted(seen)[:5]}"
            raise ConfigError(f"scheme = {how!r}, but {data.source} has {shown}: leave scheme out")
        spec["scheme"] = "plain" if how == "plain" else "bio" if bio else "plain"
        if spec["scheme"] == "bio":
            marked = spans if spans is not None else [entities(tags) for tags in rows["tags"]]
            kinds = sorted({kind for row in marked for *_, kind in row})
            spec["labels"] = [OUTSIDE, *(f"{prefix}-{kind}" for kind in kinds for prefix in "BI")]
            spec["metric"] = "entity_f1"
        else:
            spec["labels"] = sorted(seen)
            spec["metric"] = "micro_f1" if OUTSIDE in seen else "token_accuracy"
        if len(spec["labels"]) < 2:
            what = "no entity is marked" if spec["scheme"] == "bio" else f"every tag is {spec['labels'][0]!r}"
            raise DataError(f"{data.source}: {what} in the training rows, so there is nothing to learn")
        return spec

    def without_data(self, spec: dict[str, Any], base: Base) -> dict[str, Any]:
        """Read from the labels what they mean."""
        labels = set(map(str, spec["labels"])) if isinstance(spec["labels"], list) else set()
        how = choose_option("scheme", spec["scheme"], ("auto", "bio", "plain"))
        spec["scheme"] = ("bio" if is_bio(labels) else "plain") if how == "auto" else how
        plain = "micro_f1" if OUTSIDE in labels else "token_accuracy"
        return {"metric": "entity_f1" if spec["scheme"] == "bio" else plain, **spec}

    def head(self, spec: Mapping[str, Any], width: int) -> nn.Module:
        """A linear map from the state of a token to one logit per tag."""
        return LinearHead(width, len(spec["labels"]))

    # -- data ------------------------------------------------------------------------------------------------------

    def encode(self, base: Base, spec: Mapping[str, Any], rows: Rows) -> Examples:
        """Encode texts, with the place and tag of each word in the window that counts it.

        `facts` hold per row `places` (tokens), `words` (numbers in the text) and `golds` (tag numbers), per text
        `tags` (of all its words).
        """
        if not len(rows):
            return Examples((), facts={"places": [], "words": [], "golds": [], "tags": []})
        texts, words, tags, widened = _tagged(spec, rows)
        found = self.encode_inputs(base, spec, texts, None)
        flat = [row for many in found for row in many]
        places, numbers, golds = ([[] for _ in flat] for _ in range(3))
        number = {tag: i for i, tag in enumerate(spec["labels"])}
        before, unread = 0, 0
        for text, spots, own, many in zip(texts, words, tags, found):
            for word, place in enumerate(place_words(many, text, spots)):
                if place is None:
                    unread += 1
                    continue
                row = before + place[0]
                places[row].append(place[1])
                numbers[row].append(word)
                golds[row].append(number[own[word]])
            before += len(many)
        labelled = [
            Encoded(row.ids, row.types, _token_labels(row, at, gold), row.cut, row.offsets)
            for row, at, gold in zip(flat, places, golds)
        ]
        unit = torch.tensor([i for i, many in enumerate(found) for _ in many])
        notes = [f"{widened} spans cut words, and were widened to whole words."] if widened else []
        notes += [f"{unread} words were cut, or have no token: they count as not found."] if unread else []
        facts = {"places": places, "words": numbers, "golds": golds, "tags": tags, "notes": notes}
        cut = sum(many[0].cut > 0 for many in found)
        return Examples(tuple(labelled), None, unit if len(flat) > len(found) else None, None, cut, facts)

    def encode_inputs(
        self, base: Base, spec: Mapping[str, Any], texts: Sequence[str], pairs: Sequence[str] | None
    ) -> list[list[Encoded]]:
        """Encode texts, with the offsets of their tokens."""
        self.check_base(base)
        return encode_windows(base.tokenizer, spec, texts, offsets=True)

    # -- computing -------------------------------------------------------------------------------------------------

    def read(self, head: nn.Module | None, states: Tensor, mask: Tensor, spec: Mapping[str, Any]) -> Tensor:
        """Return tag logits (b, T, tags) at every token."""
        return states.float() if head is None else head(states)

    def losses(
        self, out: Tensor, examples: Examples, index: Sequence[int], spec: Mapping[str, Any], head: nn.Module | None
    ) -> Losses:
        """Cross-entropy summed over the words that count in each row; values are the best tags of these words."""
        places, golds = ([examples.facts[name][i] for i in index] for name in ("places", "golds"))
        sizes = [len(at) for at in places]
        row = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(out.device)
        token = torch.tensor([t for at in places for t in at], dtype=torch.long, device=out.device)
        gold = torch.tensor([g for many in golds for g in many], dtype=torch.long, device=out.device)
        logits = out[row, token]  # (words, tags)
        each = F.cross_entropy(logits.float(), gold, reduction="none")
        sums = torch.zeros(len(index), device=out.device, dtype=each.dtype).index_add(0, row, each)
        return Losses(sums, torch.tensor(sizes, device=out.device), logits.detach().argmax(-1).split(sizes))

    def tensor_loss(self, out: Tensor, labels: Tensor, spec: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Cross-entropy against tag numbers (b, T); IGNORED where a token carries none."""
        each = F.cross_entropy(
            out.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(labels.shape)
        return each.sum(1), (labels != IGNORED).sum(1)

    # -- results ---------------------------------------------------------------------------------------------------

    def base_head(self, base: Base, spec: Mapping[str, Any], train: Examples, validation: Examples) -> nn.Module:
        """Logistic regression on the frozen states of words, at most BASE_WORDS of them."""
        vectors, targets = _word_states(base, train)
        held, held_targets = _word_states(base, validation)
        return fit_classes(vectors, targets, held, held_targets, len(spec["labels"]))

    def judge(self, spec: Mapping[str, Any], head: nn.Module | None, examples: Examples, found: Found) -> Scores:
        """Compare tags text by text: entities found exactly, or words."""
        import numpy as np

        predicted = _assembled(spec, examples, found)
        actual = examples.facts["tags"]
        correct = [sum(a == b for a, b in zip(*pair)) for pair in zip(predicted, actual)]
        total = [len(tags) for tags in actual]
        metric, counts = spec["metric"], tag_counts
        if metric == "entity_f1":
            counts = entity_counts
        kinds: dict[str, np.ndarray] = {}
        per_text = np.zeros((len(actual), 3))
        for i, pair in enumerate(zip(predicted, actual)):
            for kind, numbers in counts(*pair).items():
                kinds[kind] = kinds.get(kind, np.zeros(3)) + numbers
                per_text[i] += numbers
        rows = np.stack([correct, total], 1).astype(float) if metric == "token_accuracy" else per_text
        value = metric_of(metric).statistic(rows)
        interval = bootstrap_interval(rows, metric_of(metric).statistic) if len(rows) > 1 else (value, value)
        metrics = {
            "n": len(actual),
            metric: value,
            "token_accuracy": sum(correct) / max(1, sum(total)),
            **_precision_recall(per_text.sum(0)),
            "loss": float(found.sums.double().sum() / found.counts.double().sum().clamp(min=1)),
            "per_label": {kind: _scored(kinds[kind]) for kind in sorted(kinds)},
        }
        return Scores(metric, value, interval, metrics, rows, predicted=tuple(" ".join(tags) for tags in predicted))

    def answer(
        self, spec: Mapping[str, Any], head: nn.Module | None, name: str | None, rows: Sequence[Encoded],
        values: Sequence[Tensor], text: str, pair: str | None,
    ) -> Prediction:  # fmt: skip
        """Return the entities of a text, or its tagged words, in their order; see `find_words` for what a word is.

        The probability of an entity is the mean, over its words, of the probability of its type there (B and I
        together); that of a word is the probability of its tag. Words that are tagged O are left out.
        """
        labels, words = list(spec["labels"]), find_words(text)
        shares: list[Tensor | None] = [
            None if place is None else torch.softmax(values[place[0]][place[1]].double(), -1)
            for place in place_words(rows, text, words)
        ]
        tags = [OUTSIDE if share is None else labels[int(share.argmax())] for share in shares]
        if spec["scheme"] == "bio":
            marked = entities(tags)
            meant = {kind: [i for i, tag in enumerate(labels) if tag[2:] == kind] for *_, kind in marked}
        else:
            marked = [(i, i + 1, tag) for i, tag in enumerate(tags) if tag != OUTSIDE and shares[i] is not None]
            meant = {tag: [i] for i, tag in enumerate(labels)}
        spans = []
        for first, end, kind in marked:
            sure = [float(share[meant[kind]].sum()) for share in shares[first:end] if share is not None]
            a, b = words[first][0], words[end - 1][1]
            spans.append(Span(a, b, text[a:b], kind, sum(sure) / len(sure)))
        return Prediction(name, None, {}, None, rows[0].cut, len(rows), spans=tuple(spans))


def _tagged(spec: Mapping[str, Any], rows: Rows) -> tuple[list[str], list[list[tuple[int, int]]], list[list[str]], int]:
    """Return texts, where their words are, the tag of each word, and how many spans were widened to whole words."""
    problems: list[str] = []
    if rows.get("tokens") is not None:
        texts = [" ".join(words) for words in rows["tokens"]]
        spots = [_joined(words) for words in rows["tokens"]]
        tags, widened = [list(own) for own in rows["tags"]], 0
        if spec["scheme"] == "bio":
            strange = [i for i, own in enumerate(tags) if not is_bio([*own, "B-any"])]
            problems += [f"{rows.place(i)}: tags that are not BIO: {tags[i][:8]}" for i in strange]
            tags = [bio_tags(entities(own), len(own)) for own in tags]
    else:
        texts = list(rows["text"])
        spots = [find_words(text) for text in texts]
        tags, widened = [], 0
        for i, spans in enumerate(rows["spans"]):
            own, moved = _from_spans(texts[i], spots[i], spans)
            widened += moved
            if own is None:
                problems.append(f"{rows.place(i)}: two spans share a word: {list(spans)[:8]}")
            tags.append(own or [])
    known = set(spec["labels"])
    for i, own in enumerate(tags):
        if strangers := sorted(set(own) - known):
            problems.append(f"{rows.place(i)}: {', '.join(map(repr, strangers))} not among the tags of training")
    if problems:
        more = f"\n  and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise DataError(
            f"{len(problems)} rows cannot be used:\n  " + "\n  ".join(problems[:PROBLEMS_SHOWN]) + more
            + f"\nThe tags of this adapter are {', '.join(spec['labels'][:20])}. Correct or remove these rows."
        )  # fmt: skip
    return texts, spots, tags, widened


def _joined(words: Sequence[str]) -> list[tuple[int, int]]:
    """Return where words are in the text that joins them by spaces."""
    spots, at = [], 0
    for word in words:
        spots.append((at, at + len(word)))
        at += len(word) + 1
    return spots


def _from_spans(
    text: str, words: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int, str]]
) -> tuple[list[str] | None, int]:
    """Return BIO tags (None where two spans share a word) and how many spans were widened to whole words."""
    marked, widened, last = [], 0, 0
    for start, end, kind in spans:
        first, after = words_of_span(words, start, end)
        if first < last:
            return None, widened
        piece = text[start:end]
        inside = (start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip()))
        widened += inside != (words[first][0], words[after - 1][1])
        marked.append((first, after, kind))
        last = after
    return bio_tags(marked, len(words)), widened


def _token_labels(row: Encoded, places: Sequence[int], golds: Sequence[int]) -> tuple[int, ...]:
    labels = [IGNORED] * len(row.ids)
    for place, gold in zip(places, golds):
        labels[place] = gold
    return tuple(labels)


def _word_states(base: Base, examples: Examples, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    """Return frozen states (n, D) of words, float32 on the CPU, and their tags (n,)."""
    chosen = some_rows([len(places) for places in examples.facts["places"]], BASE_WORDS)
    vectors, targets = [torch.zeros(0, base.anatomy.hidden_size)], [torch.zeros(0, dtype=torch.long)]
    for i, own in row_states(base, examples, chosen, batch_size):
        vectors.append(own[examples.facts["places"][i]].float().cpu())
        targets.append(torch.tensor(examples.facts["golds"][i], dtype=torch.long))
    return torch.cat(vectors), torch.cat(targets)


def _assembled(spec: Mapping[str, Any], examples: Examples, found: Found) -> list[list[str]]:
    """Return the predicted tags of every text; words that no window holds are not found: O, or no tag at all."""
    labels = list(spec["labels"])
    unread = OUTSIDE if OUTSIDE in labels else ""
    predicted = [[unread] * len(tags) for tags in examples.facts["tags"]]
    for row, best in enumerate(found.values):
        unit = row if examples.unit is None else int(examples.unit[row])
        for word, tag in zip(examples.facts["words"][row], best.tolist()):
            predicted[unit][word] = labels[tag]
    return predicted


def _precision_recall(counts: Any) -> dict[str, float]:
    hits, extra, missed = (float(value) for value in counts)
    return {
        "precision": hits / (hits + extra) if hits + extra else 0.0,
        "recall": hits / (hits + missed) if hits + missed else 0.0,
    }


def _scored(counts: Any) -> dict[str, float]:
    hits, extra, missed = (float(value) for value in counts)
    both = 2 * hits + extra + missed
    return _precision_recall(counts) | {"f1": 2 * hits / both if both else 0.0, "support": int(hits + missed)}

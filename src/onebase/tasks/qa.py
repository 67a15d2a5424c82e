"""Extractive question answering: where in a context the answer to a question stands, or that it has none.

Two logits per token say where the answer starts and ends (Devlin et al. 2019, arXiv 1810.04805, sections 4.2 and 4.3).
A long context is read in windows that overlap; windows that lack the answer point at their first token, as questions
without an answer do. In a decoder the first token sees nothing, so that there "no answer" is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.encode import OVERLAP, Encoded, encode_contexts
from onebase.errors import ConfigError, DataError, UnsupportedError
from onebase.heads import LinearHead
from onebase.statistics import bootstrap_interval
from onebase.tasks.answering import NOWHERE, Candidate, candidates, compare_answers, token_span
from onebase.tasks.frozen import row_states, some_rows
from onebase.tasks.registry import register_task
from onebase.tasks.task import Examples, Found, Losses, Prediction, Scores, Span, Task

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.data import Data, Rows

SHORTEST = 16  # tokens of a row: a question takes at most half of them
SHOWN = 5  # answers of a prediction
NO_ANSWER = "no answer"
# The base's own head: tokens whose frozen states are kept (float32: 92 MB at width 384), the L2 penalties that are
# tried on validation (mean loss per window + penalty * |W|^2), and the steps of LBFGS.
BASE_TOKENS = 60_000
PENALTIES = (1e-3, 1e-2, 1e-1)
STEPS = 40


class SpanHead(LinearHead):
    """A linear map to a start and an end logit, with what "no answer" is worth.

    `margin` is added to the score of "no answer" before it is compared with the best answer's; it is chosen on
    validation, where some questions have none.
    """

    def __init__(self, width: int):
        super().__init__(width, 2)
        self.margin = nn.Buffer(torch.zeros(()))


@register_task
class QuestionAnswering(Task):
    """An answer that is a piece of the context."""

    kind: ClassVar[str] = "qa"
    summary: ClassVar[str] = "questions whose answer is a piece of a context"
    places: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[Mapping[str, Any]] = {"windows": True, "overlap": OVERLAP, "answer_length": 30}
    learned: ClassVar[tuple[str, ...]] = ("no_answer",)

    def check_base(self, base: Base) -> None:
        """Require a tokenizer that says where its tokens are."""
        if not getattr(base.tokenizer, "is_fast", False):
            raise UnsupportedError(f"{self.kind} needs a fast tokenizer, which tells where its tokens are in the text")

    def complete(self, spec: dict[str, Any], base: Base, data: Data, given: Mapping[str, Any]) -> dict[str, Any]:
        """Note whether a question may have no answer, as far as the training rows tell."""
        if not isinstance(spec["answer_length"], int) or spec["answer_length"] < 1:
            raise ConfigError(f"answer_length = {spec['answer_length']!r}: expected tokens, at least 1")
        if spec["max_length"] < SHORTEST:
            raise ConfigError(f"max_length = {spec['max_length']}: question and context need at least {SHORTEST}")
        answers = data.train["answers"]
        if not any(answers):
            raise DataError(f"{data.source}: no question has an answer in the training rows; nothing can be learned")
        return spec | {"pair": True, "no_answer": not all(answers), "labels": []}

    def without_data(self, spec: dict[str, Any], base: Base) -> dict[str, Any]:
        """Every question has an answer, unless the spec says otherwise."""
        return {"no_answer": False, **spec, "pair": True}

    def head(self, spec: Mapping[str, Any], width: int) -> nn.Module:
        """A linear map from the state of a token to its start and end logits."""
        return SpanHead(width)

    # -- data ------------------------------------------------------------------------------------------------------

    def encode(self, base: Base, spec: Mapping[str, Any], rows: Rows) -> Examples:
        """Encode questions with the windows of their contexts; targets are (first, last) token of the first answer.

        `facts` hold per question its `context` and its right `answers`.
        """
        if not len(rows):
            return Examples((), torch.zeros(0, 2, dtype=torch.long), facts={"contexts": [], "answers": []})
        found = self.encode_inputs(base, spec, rows["question"], rows["context"])
        targets, hidden = [], 0
        for i, (many, answers) in enumerate(zip(found, rows["answers"])):
            if not answers and not spec["no_answer"]:
                raise DataError(
                    f"{rows.place(i)}: no answer, but every question of the training rows has one. Add such rows to "
                    "train, or remove this one."
                )
            text, start = answers[0] if answers else ("", 0)
            own = [token_span(row, start, start + len(text)) if answers else (NOWHERE, NOWHERE) for row in many]
            targets += own
            hidden += bool(answers) and all(at == (NOWHERE, NOWHERE) for at in own)
        flat = tuple(row for many in found for row in many)
        unit = torch.tensor([i for i, many in enumerate(found) for _ in many])
        notes = (
            [f"{hidden} answers do not fit into a window, or were cut: nothing is learned of them."] if hidden else []
        )
        facts = {
            "contexts": list(rows["context"]),
            "answers": [[text for text, _ in answers] for answers in rows["answers"]],
            "notes": notes,
        }
        cut = sum(many[0].cut > 0 for many in found)
        return Examples(flat, torch.tensor(targets), unit if len(flat) > len(found) else None, None, cut, facts)

    def encode_inputs(
        self, base: Base, spec: Mapping[str, Any], texts: Sequence[str], pairs: Sequence[str] | None
    ) -> list[list[Encoded]]:
        """Encode questions with the windows of their contexts."""
        self.check_base(base)
        return encode_contexts(base.tokenizer, spec, texts, pairs or [])

    # -- computing -------------------------------------------------------------------------------------------------

    def read(self, head: nn.Module | None, states: Tensor, mask: Tensor, spec: Mapping[str, Any]) -> Tensor:
        """Return (b, T, 2) start and end logits; padding can be neither."""
        if head is None:
            return states.float()
        logits = head(states)
        return logits.masked_fill(~mask.bool()[..., None], torch.finfo(logits.dtype).min)

    def losses(
        self, out: Tensor, examples: Examples, index: Sequence[int], spec: Mapping[str, Any], head: nn.Module | None
    ) -> Losses:
        """Mean of the cross-entropies of start and end over the tokens of each window, each window counting once."""
        assert examples.targets is not None
        sums, counts = self.tensor_loss(out, examples.targets[torch.tensor(list(index))].to(out.device), spec)
        return Losses(sums, counts, out.detach())

    def tensor_loss(self, out: Tensor, labels: Tensor, spec: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Mean of the cross-entropies against (b, 2) numbers of the first and the last token."""
        each = F.cross_entropy(out.float(), labels, reduction="none")  # (b, T, 2) against (b, 2): (b, 2)
        return each.mean(1), torch.ones(len(labels), device=out.device)

    # -- results ---------------------------------------------------------------------------------------------------

    def base_head(self, base: Base, spec: Mapping[str, Any], train: Examples, validation: Examples) -> nn.Module:
        """The same head, fitted on frozen states of at most BASE_TOKENS tokens."""
        return fit_spans(_kept(base, train), _kept(base, validation))

    def finish(self, spec: Mapping[str, Any], head: nn.Module | None, validation: Examples, found: Found) -> None:
        """Choose the margin of "no answer" that is best on validation."""
        if not spec["no_answer"] or not isinstance(head, SpanHead):
            return
        trials: list[tuple[float, float]] = []  # by how much the answer beats "no answer"; what answering gains in F1
        for windows, values, context, right in _questions(validation, found):
            ranked, nothing = candidates(windows, values, context, spec["answer_length"], 1)
            if ranked:
                best = context[ranked[0].start : ranked[0].end]
                gain = compare_answers(best, right)[0] - compare_answers("", right)[0]
                trials.append((ranked[0].score - nothing, gain))
        head.margin.fill_(best_margin(trials))

    def judge(self, spec: Mapping[str, Any], head: nn.Module | None, examples: Examples, found: Found) -> Scores:
        """Compute F1 and exact match of the best answer over the windows of each question."""
        import numpy as np

        texts, f1, exact = [], [], []
        for windows, values, context, right in _questions(examples, found):
            ranked = self._ranked(spec, head, windows, values, context, 1)
            texts.append(context[ranked[0].start : ranked[0].end] if ranked else "")
            one, same = compare_answers(texts[-1], right)
            f1.append(one)
            exact.append(same)
        rows, value = np.array(f1), sum(f1) / len(f1)
        interval = bootstrap_interval(rows) if len(rows) > 1 else (value, value)
        loss = float(found.sums.double().sum() / found.counts.double().sum().clamp(min=1))
        metrics: dict[str, Any] = {
            "n": len(f1),
            "answer_f1": value,
            "exact_match": sum(exact) / len(exact),
            "loss": loss,
        }
        answered = [bool(right) for right in examples.facts["answers"]]
        if spec["no_answer"] and any(answered) and not all(answered):
            metrics["answered_f1"] = float(rows[np.array(answered)].mean())
            metrics["no_answer_accuracy"] = float(rows[~np.array(answered)].mean())
        return Scores("answer_f1", value, interval, metrics, rows, predicted=tuple(texts))

    def answer(
        self, spec: Mapping[str, Any], head: nn.Module | None, name: str | None, rows: Sequence[Encoded],
        values: Sequence[Tensor], text: str, pair: str | None,
    ) -> Prediction:  # fmt: skip
        """Return answers, best first.

        The probability of an answer is that of its start times that of its end, in its window. "No answer" is a span
        without text, labelled so, at its place among the answers.
        """
        context = pair or ""
        spans = [
            Span(c.start, c.end, context[c.start : c.end], "" if c.end else NO_ANSWER, min(1.0, math.exp(c.score)))
            for c in self._ranked(spec, head, rows, values, context, SHOWN)
        ]
        return Prediction(name, None, {}, None, rows[0].cut, len(rows), spans=tuple(spans))

    def _ranked(
        self, spec: Mapping[str, Any], head: nn.Module | None, windows: Sequence[Encoded], values: Sequence[Tensor],
        context: str, top: int,
    ) -> list[Candidate]:  # fmt: skip
        """Return the best answers, "no answer" (an empty piece at 0) among them where the data has such questions."""
        ranked, nothing = candidates(windows, values, context, spec["answer_length"], top)
        if spec["no_answer"]:
            margin = float(head.margin) if isinstance(head, SpanHead) else 0.0
            ranked = sorted([*ranked, Candidate(nothing + margin, 0, 0)], key=lambda c: -c.score)
        return ranked[:top]


def best_margin(trials: Sequence[tuple[float, float]]) -> float:
    """Return the margin m that gains most F1 when exactly the questions with lead > m are answered.

    Args:
        trials: per question its lead (score of the best answer minus that of "no answer"), and the F1 that answering
            gains over not answering.

    Returns:
        The margin, halfway between two leads; of equally good ones the nearest to 0.
    """
    ranked = sorted(trials, reverse=True)
    if not ranked:
        return 0.0
    leads, gains = [lead for lead, _ in ranked], [0.0, *accumulate(gain for _, gain in ranked)]
    cuts = [leads[0] + 1.0, *((a + b) / 2 for a, b in pairwise(leads)), leads[-1] - 1.0]
    scored = [*zip(cuts, gains), (0.0, gains[sum(lead > 0 for lead in leads)])]  # gains[k]: of answering the first k
    return max(scored, key=lambda pair: (round(pair[1], 9), -abs(pair[0])))[0]


def _questions(examples: Examples, found: Found) -> list[tuple[list[Encoded], list[Tensor], str, list[str]]]:
    """Return per question its windows, their logits, its context and its right answers."""
    units = range(len(examples)) if examples.unit is None else examples.unit.tolist()
    grouped: list[tuple[list[Encoded], list[Tensor], str, list[str]]] = [
        ([], [], context, right) for context, right in zip(examples.facts["contexts"], examples.facts["answers"])
    ]
    for row, value, unit in zip(examples.rows, found.values, units):
        grouped[unit][0].append(row)
        grouped[unit][1].append(value)
    return grouped


def _kept(base: Base, examples: Examples, batch_size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """Return frozen states of windows in a seeded order: (tokens, D), each token's window, and (windows, 2) targets.

    Targets are numbers of rows of the states.
    """
    chosen = some_rows([len(row.ids) for row in examples.rows], BASE_TOKENS)
    states, window, targets, before = [torch.zeros(0, base.anatomy.hidden_size)], [], [], 0
    assert examples.targets is not None
    for i, own in row_states(base, examples, chosen, batch_size):
        states.append(own.float().cpu())
        window += [len(targets)] * len(own)
        targets.append((examples.targets[i] + before).tolist())
        before += len(own)
    return torch.cat(states), torch.tensor(window, dtype=torch.long), torch.tensor(targets).view(-1, 2)


def fit_spans(train: tuple[Tensor, Tensor, Tensor], validation: tuple[Tensor, Tensor, Tensor]) -> SpanHead:
    """Fit start and end logits on frozen states by LBFGS, the L2 penalty chosen by the loss on validation.

    Args:
        train, validation: states (tokens, D), the window of each token, targets (windows, 2) as rows of the states.
    """
    head = SpanHead(train[0].shape[1])
    head.standardize(train[0])
    inputs, held = ((part[0] - head.center) * head.scale for part in (train, validation))
    best = float("inf")
    weight, bias = (torch.zeros_like(part, requires_grad=True) for part in (head.weight, head.bias))
    for penalty in sorted(PENALTIES, reverse=True):  # from the stiffest, each starting where the last one ended
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=STEPS, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023 (called inside this round only)
            loss = _span_loss(inputs @ weight.t() + bias, *train[1:]) + penalty * weight.square().sum()  # noqa: B023
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            loss = float(_span_loss(held @ weight.t() + bias, *validation[1:]))
            if loss < best:
                best = loss
                head.weight.copy_(weight)
                head.bias.copy_(bias)
    return head


def _span_loss(logits: Tensor, window: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over windows of the cross-entropies of start and end, over tokens laid end to end."""
    index = window[:, None].expand_as(logits)
    top = torch.full((len(targets), 2), -float("inf")).scatter_reduce(0, index, logits.detach(), "amax")
    total = torch.zeros(len(targets), 2).index_add(0, window, (logits - top[window]).exp()).log() + top
    return (total - logits.gather(0, targets)).mean()

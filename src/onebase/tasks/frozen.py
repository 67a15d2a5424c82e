"""Vectors of the frozen base, and heads that are fitted on them: a base's own answer, and where a head starts."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from onebase.encode import Encoded, collate, pad_id
from onebase.heads import LinearHead
from onebase.tasks.task import Examples, per_unit

if TYPE_CHECKING:
    from onebase.base import Base

# Inverse strengths of the L2 penalty that are tried on validation, for standardised vectors.
STRENGTHS = (1e-3, 1e-2, 1e-1)
# Ridge penalties that are tried on validation, per training row, for standardised features.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


def frozen_vectors(base: Base, examples: Examples, spec: Mapping[str, Any], batch_size: int = 64) -> Tensor:
    """Return pooled states of the plain base: (units, D) float32 on the CPU.

    It is the mean over the windows of each unit; of pairs whose texts are read apart the features (units, 4 D + 1).
    """
    out = _pooled(base, examples.rows, spec["pooling"], batch_size)
    if "second" in examples.facts:
        return pair_features(out, _pooled(base, examples.facts["second"], spec["pooling"], batch_size))
    return per_unit(examples, list(out)) if len(out) else out


def _pooled(base: Base, rows: Sequence[Encoded], pooling: str, batch_size: int) -> Tensor:
    out = torch.zeros(len(rows), base.anatomy.hidden_size)
    with torch.no_grad():
        for index in Examples(tuple(rows)).batches(range(len(rows)), batch_size):
            batch = collate([rows[i] for i in index], pad_id(base.tokenizer), device=base.device)
            out[index] = base.vectors(batch, None, pooling).cpu()
    return out


def some_rows(sizes: Sequence[int], enough: int) -> list[int]:
    """Return rows in a seeded order, until their sizes together are enough."""
    order = list(range(len(sizes)))
    random.Random(0).shuffle(order)
    before = accumulate((sizes[i] for i in order), initial=0)
    return [i for i, size in zip(order, before) if size < enough]


def row_states(base: Base, examples: Examples, chosen: Sequence[int], batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the number of a row and the states of its tokens, (tokens, D) of the plain base, by length of the rows.

    Args:
        base, examples: whose states of what.
        chosen: which rows.
        batch_size: rows of a forward.
    """
    for index in examples.batches(chosen, batch_size):
        batch = collate([examples.rows[i].bare for i in index], pad_id(base.tokenizer), device=base.device)
        with torch.no_grad():
            states = base.states(batch, None)
        for i, own in zip(index, states):
            yield i, own[: len(examples.rows[i].ids)]


def ridge(inputs: Tensor, targets: Tensor, penalties: Sequence[float]) -> Iterator[Tensor]:
    """Yield the weights, (F,) or (F, k), of ridge regressions, one for each penalty per row.

    Args:
        inputs: (n, F) float64.
        targets: (n,) or (n, k) float64, centred.
        penalties: of the squared weights.
    """
    gram, cross = inputs.T @ inputs / len(inputs), inputs.T @ targets / len(inputs)
    values, axes = torch.linalg.eigh(gram)
    turned = axes.T @ cross
    for penalty in penalties:
        yield axes @ (turned / (values.clamp(min=0) + penalty).view(-1, *[1] * (turned.dim() - 1)))


def pair_features(one: Tensor, two: Tensor) -> Tensor:
    """Return ``[u, v, |u - v|, u * v, cos(u, v)]`` of vectors at unit length.

    Args:
        one, two: (n, D) pooled vectors of the first and second texts.

    Returns:
        (n, 4 D + 1).
    """
    u, v = F.normalize(one.float(), dim=-1), F.normalize(two.float(), dim=-1)
    return torch.cat([u, v, (u - v).abs(), u * v, (u * v).sum(-1, keepdim=True)], -1)


def pair_width(width: int) -> int:
    """Return the number of features of a pair of vectors of `width`."""
    return 4 * width + 1


def fit_numbers(
    head: LinearHead, vectors: Tensor, targets: Tensor, validation: Tensor, validation_targets: Tensor
) -> None:
    """Fit a ridge regression on frozen features, its penalty chosen on validation by squared error.

    Args:
        head: receives the solution; one output.
        vectors: (n, F) of the training units.
        targets: (n,).
        validation, validation_targets: the same of the validation units; may be empty.
    """
    head.standardize(vectors)
    inputs, mean = ((vectors - head.center) * head.scale).double(), targets.double().mean()
    held = ((validation - head.center) * head.scale).double()
    best = float("inf")
    for weight in ridge(inputs, targets.double() - mean, PENALTIES if len(held) else (1.0,)):
        error = float(((held @ weight + mean - validation_targets) ** 2).mean()) if len(held) else 0.0
        if error < best:
            best = error
            with torch.no_grad():
                head.weight.copy_(weight.float()[None])
                head.bias.fill_(float(mean))


def fit_labels(
    head: LinearHead,
    vectors: Tensor,
    targets: Tensor,
    validation: Tensor,
    validation_targets: Tensor,
    positive: Sequence[float],
) -> None:
    """Fit one logistic regression per output on frozen features, their L2 penalty chosen on validation by log loss.

    Args:
        head: receives the solution.
        vectors: (n, F) of the training units.
        targets: (n, outputs), 0 to 1: a share counts as a positive and a negative row by parts.
        validation, validation_targets: the same of the validation units; may be empty.
        positive: weight of the positive rows of each output.
    """
    head.standardize(vectors)
    inputs = ((vectors - head.center) * head.scale).numpy()
    held = (validation - head.center) * head.scale
    weight = torch.tensor(list(positive))
    best = float("inf")
    for strength in STRENGTHS if len(held) else STRENGTHS[1:2]:
        found = [_fit_label(inputs, targets[:, i], strength, weight[i]) for i in range(targets.shape[1])]
        weights, biases = torch.stack([w for w, _ in found]), torch.stack([b for _, b in found])
        error = 0.0
        if len(held):
            logits = held @ weights.T + biases
            error = float(F.binary_cross_entropy_with_logits(logits, validation_targets, pos_weight=weight))
        if error < best:
            best = error
            with torch.no_grad():
                head.weight.copy_(weights)
                head.bias.copy_(biases)


def _fit_label(inputs: Any, targets: Tensor, strength: float, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight (F,) and bias () of one output; a constant target gives its own log odds, at most 5."""
    import numpy as np
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if float(targets.max()) == 0.0 or float(targets.min()) == 1.0:
        return torch.zeros(inputs.shape[1]), torch.tensor(-5.0 if float(targets.max()) == 0.0 else 5.0)
    share = targets.double().numpy()
    rows = np.concatenate([np.flatnonzero(share > 0), np.flatnonzero(share < 1)])
    classes = np.concatenate([np.ones(int((share > 0).sum())), np.zeros(int((share < 1).sum()))])
    counts = np.concatenate([share[share > 0] * float(positive), 1 - share[share < 1]])
    model = LogisticRegression(C=strength, max_iter=100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a start and a baseline: 100 steps are plenty
        model.fit(inputs[rows], classes, sample_weight=counts)
    return torch.from_numpy(model.coef_[0]).float(), torch.from_numpy(model.intercept_).float()[0]


def fit_classes(
    vectors: Tensor,
    targets: Tensor,
    validation: Tensor,
    validation_targets: Tensor,
    labels: int,
    balanced: bool = False,
) -> LinearHead:
    """Fit a logistic regression on frozen vectors, its L2 penalty chosen on validation.

    Args:
        vectors: (n, D) of the training units.
        targets: (n,) class numbers.
        validation, validation_targets: the same of the validation units; may be empty.
        labels: number of classes.
        balanced: weigh classes by their inverse frequency, and choose the penalty by macro recall.

    Returns:
        A head on the CPU.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    judge = balanced_accuracy_score if balanced else accuracy_score
    head = LinearHead(vectors.shape[1], labels)
    head.standardize(vectors)
    inputs = ((vectors - head.center) * head.scale).numpy()
    held = ((validation - head.center) * head.scale) if len(validation) else None
    best = -1.0
    for strength in STRENGTHS if held is not None else STRENGTHS[1:2]:
        model = LogisticRegression(C=strength, max_iter=100, class_weight="balanced" if balanced else None)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a start and a baseline: 100 steps are plenty
            model.fit(inputs, targets.numpy())
        weight, bias = torch.from_numpy(model.coef_).float(), torch.from_numpy(model.intercept_).float()
        if len(weight) == 1:  # two classes: one row of weights, for the second class
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        present = torch.from_numpy(model.classes_)
        score = 0.0
        if held is not None:
            found = present[(held @ weight.t() + bias).argmax(1)]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a class without validation rows
                score = float(judge(validation_targets.numpy(), found.numpy()))
        if score > best:
            best = score
            with torch.no_grad():
                head.weight.zero_()
                head.bias.fill_(-10.0)  # a class without training rows is never chosen
                head.weight[present], head.bias[present] = weight, bias
    return head

"""Vectors of the frozen base, and heads that are fitted on them: a base's own answer, and where a head starts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.encode import collate, pad_id
from onebase.heads import LinearHead
from onebase.tasks.task import Examples, per_unit

if TYPE_CHECKING:
    from onebase.base import Base

# Inverse strengths of the L2 penalty that are tried on validation, for standardised vectors.
STRENGTHS = (1e-3, 1e-2, 1e-1)


def frozen_vectors(base: Base, examples: Examples, spec: Mapping[str, Any], batch_size: int = 64) -> Tensor:
    """Return pooled states of the plain base, the mean over the windows of each unit: (units, D) float32 on the CPU."""
    out = torch.zeros(len(examples), base.anatomy.hidden_size)
    with torch.no_grad():
        for index in examples.batches(range(len(examples)), batch_size):
            batch = collate([examples.rows[i] for i in index], pad_id(base.tokenizer), device=base.device)
            out[index] = base.vectors(batch, None, spec["pooling"]).cpu()
    return per_unit(examples, list(out)) if len(out) else out


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

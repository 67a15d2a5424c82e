"""The base's own score: a head on frozen vectors. It is also where an adapter's head starts."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from onebase.encode import collate, pad_id
from onebase.examples import Examples
from onebase.heads import ClassificationHead

if TYPE_CHECKING:
    from onebase.base import Base

# Inverse strengths of the L2 penalty that are tried on validation, for standardised vectors.
STRENGTHS = (1e-3, 1e-2, 1e-1)


def frozen_vectors(base: Base, examples: Examples, pooling: str, batch_size: int = 64) -> Tensor:
    """Return pooled states of the plain base, (n, D) float32 on the CPU."""
    out = torch.zeros(len(examples), base.anatomy.hidden_size)
    with torch.no_grad():
        for index in examples.batches(range(len(examples)), batch_size):
            batch = collate([examples.rows[i] for i in index], pad_id(base.tokenizer), device=base.device)
            out[index] = base.vectors(batch, None, pooling).cpu()
    return out


def fit_head(
    vectors: Tensor, targets: Tensor, validation: Tensor, validation_targets: Tensor, labels: int
) -> ClassificationHead:
    """Fit a logistic regression on frozen vectors, its L2 penalty chosen on validation.

    Args:
        vectors: (n, D) of the training rows.
        targets: (n,) class numbers.
        validation, validation_targets: the same of the validation rows; may be empty.
        labels: number of classes.

    Returns:
        A head on the CPU.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    head = ClassificationHead(vectors.shape[1], labels)
    head.standardize(vectors)
    inputs = ((vectors - head.center) * head.scale).numpy()
    held = ((validation - head.center) * head.scale) if len(validation) else None
    best = -1.0
    for strength in STRENGTHS if held is not None else STRENGTHS[1:2]:
        model = LogisticRegression(C=strength, max_iter=100)
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
            score = float((found == validation_targets).float().mean())
        if score > best:
            best = score
            with torch.no_grad():
                head.weight.zero_()
                head.bias.fill_(-10.0)  # a class without training rows is never chosen
                head.weight[present], head.bias[present] = weight, bias
    return head

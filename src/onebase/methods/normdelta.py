"""The change of a norm's gain and bias, which several methods train.

Formula: h' = h + dgamma * n(x) + dbeta, n(x) recomputed from the norm's input.
Never a rescale of h: pretrained gains can be tiny (|gamma| = 5e-33 in MiniLM), so h cannot be divided by them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.core.contracts import Delta
from onebase.core.plan import At
from onebase.core.site import NormInfo


class NormDelta(Delta):
    """``h + dgamma * n(x) + dbeta``: a trained norm, without dividing by the pretrained gain.

    Args:
        d: features.
        norm: how the norm computes.
        bias: train dbeta; only where the norm has a bias.
    """

    def __init__(self, d: int, norm: NormInfo, bias: bool = True):
        super().__init__()
        self.norm = norm
        self.gamma = nn.Parameter(torch.zeros(d))
        self.beta = nn.Parameter(torch.zeros(d)) if norm.has_bias and bias else None

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        """Add the change of gain and bias."""
        d, gamma, beta = x.shape[-1:], self.gamma.to(x.dtype), None if self.beta is None else self.beta.to(x.dtype)
        if self.norm.kind == "layer":
            change = F.layer_norm(x, d, gamma, beta, self.norm.eps)
        else:
            change = F.rms_norm(x, d, gamma, self.norm.eps)
            change = change if beta is None else change + beta
        return h + change.to(h.dtype)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add to gain and bias; right also where the module multiplies by 1 + weight (Gemma)."""
        if self.beta is None:
            return weight + self.gamma, bias
        return weight + self.gamma, self.beta if bias is None else bias + self.beta

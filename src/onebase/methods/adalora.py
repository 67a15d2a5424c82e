"""AdaLoRA: a low-rank change of linear maps as a singular value decomposition, whose ranks training decides.

Paper: Zhang et al. 2023, AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512.
Formula: h' = h + s * P diag(lambda) Q x, P (d_out, r), Q (r, d_in), s = alpha / r (eq. 3).
Penalty: gamma * sum over sites of |P'P - I|^2 + |QQ' - I|^2, Frobenius (eq. 4), once per optimizer step.
Importance of a weight: I = |w * dL/dw| (eq. 8), smoothed: E = b1 E + (1 - b1) I, U = b2 U + (1 - b2) |I - E|
    (eq. 9, 10); it is E * U (eq. 11). Of triplet i: that of lambda_i, plus the means over column i of P and row i of
    Q (eq. 7).
Budget: r per site at first; from t_i on it falls by a cubic to `target` per site at T - t_f (eq. 12); every few
    steps lambda is set to zero outside of the budget's most important triplets of all sites. Between two prunings
    they may grow again, as in the paper. From T - t_f on the choice is fixed, and they stay zero.
Parameters: sum over sites of r * (d_in + d_out + 1) while training; then those of the triplets that are left.
Start: P, Q normal with std 0.02 (the authors' code and PEFT), lambda zero, so the start is exactly the base.
Differs: t_i and t_f are shares of training, so one setting fits data of any size. The importance reads the gradient of
    the loss after clipping, and the weights after the step, as the authors' code does.
Loops of other libraries call neither the penalty nor the pruning: there it trains with all of r; call
    `adapter.module.penalty()` and `adapter.module.stepped(step, steps)` to have them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from onebase.core.bank import Bank, add_product
from onebase.core.contracts import AdapterModule, Delta
from onebase.core.plan import At
from onebase.core.site import Site
from onebase.methods.method import Init, Method, check, match_linears
from onebase.methods.registry import register

INIT_STD = 0.02
TRIPLET = ("P", "lam", "Q")


class TripletDelta(Delta):
    """``h + s * P diag(lambda) Q dropout(x)``."""

    def __init__(self, p: Tensor, lam: Tensor, q: Tensor, scale: float, dropout: float):
        super().__init__()
        self.P, self.lam, self.Q = nn.Parameter(p), nn.Parameter(lam), nn.Parameter(q)  # (d_out, r), (r,), (r, d_in)
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor, h: Tensor, at: At) -> Tensor:
        """Add the low-rank map of x."""
        inner = F.linear(at.dropout(x, self.dropout, self.training), self.Q.to(h.dtype)) * self.lam.to(h.dtype)
        return h + self.scale * F.linear(inner, self.P.to(h.dtype))

    def signature(self) -> Hashable | None:
        """Return shapes, scale and rate of dropout."""
        return (self.P.shape, self.Q.shape, self.scale, self.dropping())

    def bank(self, bank: Bank, x: Tensor, h: Tensor) -> Tensor:
        """Add each one's low-rank map of x."""
        inner = torch.bmm(bank.dropout(x), bank.stacked("Q", h).mT) * bank.vector("lam", h)
        return add_product(h, inner, bank.stacked("P", h), self.scale)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Add s P diag(lambda) Q to the weight."""
        return weight + self.scale * (self.P * self.lam) @ self.Q, bias

    def keep(self, rows: Tensor) -> TripletDelta:
        """Return a delta of the triplets `rows`, (k,)."""
        p, lam, q = self.P.detach()[:, rows].clone(), self.lam.detach()[rows].clone(), self.Q.detach()[rows].clone()
        return TripletDelta(p, lam, q, self.scale, self.dropout)


class GrowingDelta(TripletDelta):
    """A triplet delta in training: it remembers how important each weight is, and which triplets the budget keeps."""

    def __init__(self, p: Tensor, lam: Tensor, q: Tensor, scale: float, dropout: float):
        super().__init__(p, lam, q, scale, dropout)
        self.kept = nn.Buffer(torch.ones(len(lam)))  # (r,), 1 where the last pruning kept the triplet
        for name in TRIPLET:
            self.register_buffer(f"mean_{name}", torch.zeros_like(getattr(self, name)))
            self.register_buffer(f"spread_{name}", torch.zeros_like(getattr(self, name)))

    def penalty(self) -> Tensor:
        """Return |P'P - I|^2 + |QQ' - I|^2."""
        eye = torch.eye(len(self.lam), device=self.lam.device)
        return (self.P.T @ self.P - eye).square().sum() + (self.Q @ self.Q.T - eye).square().sum()

    def watch(self, beta1: float, beta2: float) -> None:
        """Update the importance of every weight from the gradients of this step."""
        for name in TRIPLET:
            weight = getattr(self, name)
            if weight.grad is None:  # the site was not reached, so no weight mattered
                now = torch.zeros_like(weight)
            else:
                now = (weight.detach() * weight.grad).abs()
            mean, spread = getattr(self, f"mean_{name}"), getattr(self, f"spread_{name}")
            mean.mul_(beta1).add_(now, alpha=1 - beta1)
            spread.mul_(beta2).add_((now - mean).abs(), alpha=1 - beta2)

    def importance(self) -> Tensor:
        """Return the importance of each triplet, (r,)."""
        p, lam, q = (getattr(self, f"mean_{name}") * getattr(self, f"spread_{name}") for name in TRIPLET)
        return lam + p.mean(0) + q.mean(1)


class AdaLoRAModule(AdapterModule):
    """Triplets with the schedule that prunes them.

    Args:
        deltas: per site.
        method: the settings of the schedule.
    """

    def __init__(self, deltas: Mapping[str, GrowingDelta], method: AdaLoRA):
        super().__init__(deltas)
        self.method = method

    def _growing(self) -> list[GrowingDelta]:
        return [cast(GrowingDelta, delta) for _, delta in self.items()]

    def penalty(self) -> Tensor | None:
        """Return the orthogonality penalty of all sites."""
        if not self.method.orthogonal:
            return None
        return self.method.orthogonal * torch.stack([delta.penalty() for delta in self._growing()]).sum()

    @torch.no_grad()
    def stepped(self, step: int, steps: int) -> None:
        """Update importances, prune where the schedule says so, and hold what is pruned for good at zero."""
        method, deltas = self.method, self._growing()
        last = steps - math.floor(method.final * steps)  # the step of the last pruning
        if step <= last:
            for delta in deltas:
                delta.watch(method.beta1, method.beta2)
        if (step >= method.warm * steps and step % method.every == 0 and step < last) or step == last:
            self._prune(deltas, method.budget(step, steps, len(deltas)))
        if step >= last:
            for delta in deltas:
                delta.lam.mul_(delta.kept)

    @staticmethod
    def _prune(deltas: list[GrowingDelta], budget: int) -> None:
        """Zero lambda outside of the `budget` most important triplets of all sites; ties go to the first."""
        scores = torch.cat([delta.importance() for delta in deltas])
        kept = torch.zeros_like(scores)
        kept[scores.argsort(descending=True, stable=True)[:budget]] = 1.0
        for delta, own in zip(deltas, kept.split([len(delta.lam) for delta in deltas])):
            delta.kept.copy_(own)
            delta.lam.mul_(own)

    def fold(self) -> AdapterModule:
        """Drop pruned triplets and what only training needs. A triplet that grew again after its pruning stays."""
        with torch.no_grad():
            found = {}
            for name, delta in self.items():
                delta = cast(GrowingDelta, delta)
                found[name] = delta.keep(((delta.kept > 0) | (delta.lam != 0)).nonzero().flatten())
            return PrunedModule(found)


class PrunedModule(AdapterModule):
    """The triplets that are left."""

    def fit(self, shapes: Mapping[str, torch.Size]) -> None:
        """Take over the stored rank of every site where it is not larger than the one built."""
        for name, delta in list(self.items()):
            delta = cast(TripletDelta, delta)
            stored = shapes.get(f"deltas.{name}.lam")
            if stored is not None and len(stored) == 1 and stored[0] < len(delta.lam):
                self.deltas[name] = delta.keep(torch.arange(stored[0], device=delta.lam.device))


@register
@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Method):
    """LoRA as a singular value decomposition whose ranks training decides (arXiv 2303.10512).

    Attributes:
        rank: r of every site at first, 1 to 512; the paper starts at 1.5 times the target.
        target: triplets per site, on average, that are left at the end.
        alpha: scale numerator; s = alpha / rank.
        sites: 'all' (the paper's choice), 'paper' (q and v, LoRA's paper), part names (q k v o gate up down) or
            're:PATTERN' on site names.
        dropout: rate on x while training, 0 to below 1.
        orthogonal: gamma, weight of the penalty; the paper uses 0.1 to 0.5.
        warm: share of the steps before the first pruning.
        final: share of the steps after the last one.
        every: steps from one pruning to the next.
        beta1: smoothing of the importance; the paper uses 0.85.
        beta2: smoothing of its uncertainty; the paper uses 0.85 to 0.95.
    """

    name: ClassVar[str] = "adalora"
    summary: ClassVar[str] = "low-rank change of linear maps, ranks decided in training; merges into the base"
    mergeable: ClassVar[bool] = True

    rank: int = 12
    target: int = 8
    alpha: float = 24.0
    sites: str | tuple[str, ...] = "all"
    dropout: float = 0.0
    orthogonal: float = 0.1
    warm: float = 0.1
    final: float = 0.3
    every: int = 10
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        whole = isinstance(self.rank, int) and 1 <= self.rank <= 512
        check(whole, "adalora.rank", self.rank, "an integer from 1 to 512")
        whole = isinstance(self.target, int) and 1 <= self.target <= self.rank
        check(whole, "adalora.target", self.target, f"an integer from 1 to rank = {self.rank}")
        check(self.alpha > 0 and math.isfinite(self.alpha), "adalora.alpha", self.alpha, "a positive number")
        check(0 <= self.dropout < 1, "adalora.dropout", self.dropout, "0 <= rate < 1")
        check(0 <= self.orthogonal < 100, "adalora.orthogonal", self.orthogonal, "0 to 100")
        check(isinstance(self.every, int) and self.every >= 1, "adalora.every", self.every, "at least 1 step")
        for name in ("warm", "final", "beta1", "beta2"):
            check(0 <= getattr(self, name) < 1, f"adalora.{name}", getattr(self, name), "0 <= share < 1")
        check(self.warm + self.final < 1, "adalora.final", self.final, f"less than 1 - warm = {1 - self.warm:g}")

    def budget(self, step: int, steps: int, sites: int) -> int:
        """Return the triplets of all sites that may stay after `step` of `steps` (eq. 12)."""
        first, end = self.rank * sites, self.target * sites
        start, last = self.warm * steps, steps - math.floor(self.final * steps)
        if step <= start:
            return first
        left = 0.0 if step >= last else 1 - (step - start) / (last - start)
        return end + round((first - end) * left**3)

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Return the linear sites named by `sites`."""
        return match_linears(sites, self.sites, "adalora.sites")

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build P, lambda and Q for every site."""
        deltas = {}
        for site in sites:
            p = torch.randn(site.d_out, self.rank, generator=init.generator) * INIT_STD
            q = torch.randn(self.rank, site.d_in, generator=init.generator) * INIT_STD
            deltas[site.name] = GrowingDelta(p, torch.zeros(self.rank), q, self.alpha / self.rank, self.dropout)
        return AdaLoRAModule(deltas, self)

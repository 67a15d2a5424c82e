"""Computations that are shared by all rows: done once per adapter, so that each row gets its own adapter's result.

DeBERTa with shared keys projects one table of distances through the same maps as the tokens, and uses the result for
every row. The table has no batch rows, so a tap cannot tell whose adapter to apply. The method that reads the table is
therefore called once per group of rows, under a plan with this group only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from onebase.core.plan import At, Group, Plan
from onebase.core.route import Runtime


class PerGroup:
    """Stands in for a method of one module object; `remove` gives the method back.

    Args:
        module: the object.
        method: name of the method.
        rows: how many of its first arguments have B * k rows, as its result has.
        runtime: holds the plan of the call in progress.
    """

    def __init__(self, module: nn.Module, method: str, rows: int, runtime: Runtime):
        self.module, self.method, self.rows, self.runtime = module, method, rows, runtime
        self.original = getattr(module, method)
        module.__dict__[method] = self

    def __call__(self, *args: Any) -> Any:
        """Call the method once per group and put the results in the order of the rows."""
        plan = self.runtime.plan
        if plan is None or not plan.groups or plan.groups[0].rows is None:
            return self.original(*args)
        return self._each(plan, args)  # type: ignore[reportCallIssue]

    @torch.compiler.disable
    def _each(self, plan: Plan, args: tuple) -> Any:
        assert plan.row_group is not None
        order = torch.argsort(plan.row_group, stable=True)  # rows of the first group, of the second, ..., plain rows
        parts, start = [], 0
        for sub in one_group_plans(plan):
            chosen = order[start : start + sub.batch]
            start += sub.batch
            with self.runtime.hold(sub, self.module):
                own = [_pick(value, chosen, plan.batch) for value in args[: self.rows]]
                parts.append(self.original(*own, *args[self.rows :]))
        return _pick(torch.cat(parts), torch.argsort(order), plan.batch)

    def remove(self) -> None:
        """Give the method back."""
        del self.module.__dict__[self.method]


def one_group_plans(plan: Plan) -> Iterator[Plan]:
    """Yield a plan for the rows of each group, and one without groups for the plain rows."""
    plain = plan.batch
    for group in plan.groups:
        assert group.rows is not None
        count = len(group.rows)
        plain -= count
        alone = Group(group.adapter, None, At(group.at.draws), (0, count))
        yield Plan(count, [alone])
    if plain:
        yield Plan(plain, [])


def _pick(values: Tensor, rows: Tensor, batch: int) -> Tensor:
    """Return the given rows of (B * k, ...), k entries for each row."""
    folded = values.reshape(batch, -1, *values.shape[1:])
    return folded.index_select(0, rows).flatten(0, 1)

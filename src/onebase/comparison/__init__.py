"""Which method for my data: plan what each would cost, compare them under one budget, recommend, report."""

from __future__ import annotations

from onebase.comparison.planning import Plan, plan

__all__ = ["Plan", "plan"]

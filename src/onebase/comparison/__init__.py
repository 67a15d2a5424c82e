"""Which method for my data: plan what each would cost, compare them under one budget, recommend, report."""

from __future__ import annotations

from onebase.comparison.advice import Advice, Limits, Result, recommend
from onebase.comparison.planning import Plan, plan
from onebase.comparison.running import Comparison, compare

__all__ = ["Advice", "Comparison", "Limits", "Plan", "Result", "compare", "plan", "recommend"]

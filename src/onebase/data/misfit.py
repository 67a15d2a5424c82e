"""A cell that cannot be a value of its role: what is counted, and what is shown with its place."""

from __future__ import annotations


class Misfit(ValueError):
    """A cell that cannot be a value of its role.

    Attributes:
        what: the kind of problem, counted in summaries.
        detail: the value seen and what was expected, shown with the place.
    """

    def __init__(self, what: str, detail: str = "") -> None:
        super().__init__(f"{what}: {detail}" if detail else what)
        self.what, self.detail = what, detail


def short(value: object) -> str:
    """Return a value as it is shown in a message, in at most 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."

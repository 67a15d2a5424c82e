"""Tasks: what an adapter is for. One file per task: how rows become tokens, head, loss, score, answer."""

from onebase.tasks.registry import get_task, register_task, task_kinds
from onebase.tasks.task import Examples, Losses, Prediction, Scores, Span, Task

__all__ = [
    "Examples",
    "Losses",
    "Prediction",
    "Scores",
    "Span",
    "Task",
    "get_task",
    "register_task",
    "task_kinds",
]

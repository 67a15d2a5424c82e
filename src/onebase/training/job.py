"""One adapter in training: its order of rows, optimizer, schedule, best epoch and history, as one resumable state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onebase.adapter import Adapter
from onebase.core.draw import Draw
from onebase.errors import TrainingError
from onebase.tasks import Examples, get_task
from onebase.training.settings import Settings, shares

if TYPE_CHECKING:
    from onebase.base import Base


@dataclass(frozen=True)
class Checked:
    """A score on validation.

    Attributes:
        rank: what training maximises.
        noise: standard error of it, as far as epochs within it are as good as each other; 0 where it is exact.
        metrics: for people, by name.
    """

    rank: float
    noise: float
    metrics: dict[str, float]


Score = Callable[[], Checked]


@dataclass
class History:
    """What happened.

    Attributes:
        epochs: one entry per epoch: epoch, loss, and the validation metrics.
        best: number of the epoch that was kept (1 is the first; 0 the start), see `Settings.restore`.
        steps, rows, seconds: optimizer steps, rows seen, wall time of training without evaluation.
        notes: choices that were measured.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


class JobState:
    """An attached adapter in training.

    Args:
        base: the base that carries the adapter.
        adapter: what is trained.
        train: training rows.
        score: scores the adapter on validation.
        settings: how.
    """

    def __init__(self, base: Base, adapter: Adapter, train: Examples, score: Score, settings: Settings):
        self.base, self.adapter, self.train, self.score, self.settings = base, adapter, train, score, settings
        self.parameters = list(adapter.parameters())
        self.per_step = settings.batch_size * settings.accumulate
        self.steps_per_epoch = math.ceil(len(train) / self.per_step)
        self.steps = self.steps_per_epoch * settings.epochs
        self.optimizer, self.schedule = make_optimizer(adapter, settings, self.steps, base.anatomy.hidden_size)
        self.history = History()
        self.epoch, self.place = 0, 0  # epochs finished, effective batches of this epoch done
        self.total, self.targets = 0.0, 0.0  # loss and weight of the targets of this epoch so far
        self.top, self.waited, self.kept = float("-inf"), 0, adapter.snapshot()
        self.order = torch.Generator().manual_seed(settings.seed)
        self.order_state = self.order.get_state()  # as it was before this epoch's order was drawn
        self.shuffled: list[int] | None = None
        adapter.routed.draw = Draw(settings.seed, 0)

    # -- batches ---------------------------------------------------------------------------------------------------

    def batch(self) -> list[int]:
        """Return the row numbers of the next optimizer step, in the seeded order of this epoch."""
        order = self._shuffled()
        self.adapter.routed.draw = Draw(self.settings.seed, self.history.steps)
        start = self.place * self.per_step
        return order[start : start + self.per_step]

    def _shuffled(self) -> list[int]:
        if self.shuffled is None:
            task = get_task(self.adapter.task["kind"])
            self.train = task.for_epoch(self.train, self.settings.seed, self.epoch + 1)
            self.order_state = self.order.get_state()
            self.shuffled = torch.randperm(len(self.train), generator=self.order).tolist()
        return self.shuffled

    def step(self, loss: float, count: float, rows: int, began: float) -> None:
        """Take an optimizer step with the gradients that are there.

        Args:
            loss: summed loss of the effective batch; gradients are of this sum.
            count: weight of its targets: the step follows the mean over all of them.
            rows: rows of the effective batch.
            began: `time.perf_counter()` when its computing began.

        Raises:
            TrainingError: the loss is not finite.
        """
        self.check_finite({"loss": loss})
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= max(count, 1e-12)
        penalty = self.adapter.module.penalty()
        if penalty is not None:
            penalty.backward()
        if self.settings.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.optimizer.step()
        self.adapter.module.stepped(self.history.steps + 1, self.steps)
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.total, self.targets = self.total + loss, self.targets + count
        self.place += 1
        self.history.steps += 1
        self.history.rows += rows
        self.history.seconds += time.perf_counter() - began

    @property
    def seconds_left(self) -> float:
        """Estimated time of the remaining steps."""
        return self.history.seconds / max(1, self.history.steps) * (self.steps - self.history.steps)

    # -- epochs ----------------------------------------------------------------------------------------------------

    @property
    def epoch_is_over(self) -> bool:
        """Whether every row of this epoch was seen."""
        return self.place >= self.steps_per_epoch

    @property
    def finished(self) -> bool:
        """Whether no epoch is left, or the last ones were worse than the best."""
        patience = self.settings.patience
        return self.epoch >= self.settings.epochs or bool(patience and self.waited >= patience)

    def begin(self) -> None:
        """Score the start."""
        if not self.history.epochs:
            checked = self._checked()
            self.top = checked.rank
            self.history.epochs.append({"epoch": 0, **checked.metrics})

    def end_epoch(self) -> dict[str, float]:
        """Score the epoch that is over and keep it if it is good; return its entry of the history."""
        checked = self._checked()
        self.check_finite(checked.metrics)
        self.epoch += 1
        entry = {"epoch": self.epoch, "loss": self.total / max(self.targets, 1e-12), **checked.metrics}
        self.history.epochs.append(entry)
        slack = checked.noise if self.settings.restore == "latest" and self.history.best else 0.0
        good = checked.rank > self.top or (slack > 0 and checked.rank >= self.top - slack)
        self.top, self.waited = max(self.top, checked.rank), 0 if good else self.waited + 1
        if good:
            self.kept, self.history.best = self.adapter.snapshot(), self.epoch
        self.place, self.total, self.targets, self.shuffled = 0, 0.0, 0.0, None
        self.order_state = self.order.get_state()
        return entry

    def _checked(self) -> Checked:
        self.adapter.train(False)
        try:
            return self.score()
        finally:
            self.adapter.train()

    def check_finite(self, metrics: dict[str, float]) -> None:
        """Raise TrainingError when a value is infinite or NaN."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                lr = self.settings.lr
                raise TrainingError(
                    f"the {name.replace('_', ' ')} became {value} at step {self.history.steps + 1} of {self.steps} "
                    f"with lr = {lr:g}: nothing was stored. Try a lower rate, e.g. lr = {lr / 3:.1g}."
                )

    def end_early(self) -> None:
        """End between two steps: score what the epoch that was begun gave, and keep it if it is good.

        Its entry in the history says which part of the epoch was seen: 2.4 is four tenths of the third one.

        Raises:
            TrainingError: the score is not finite.
        """
        if self.place and not self.finished:
            part = self.place / self.steps_per_epoch
            entry = self.end_epoch()
            entry["epoch"] = round(self.epoch - 1 + part, 3)
        self.end()

    def end(self) -> None:
        """Leave the kept epoch in the adapter."""
        self.adapter.put(self.kept)
        self.release()

    def release(self) -> None:
        """Give the adapter's switches back."""
        self.adapter.train(False)
        self.adapter.routed.draw = None

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that the rest of training depends on: tensors, and JSON values.

        Taken between steps. `restore` on a job of the same data and settings continues bit by bit.
        """
        tensors = {f"now.{name}": t.clone() for name, t in self.adapter.tensors().items()}
        tensors |= {f"kept.{name}": t for name, t in self.kept.items()}
        for i, parameter in enumerate(self._optimized()):
            for name, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{i}.{name}"] = torch.as_tensor(value).clone()
        tensors["order"] = self.order_state.clone()
        facts = {
            "epoch": self.epoch, "place": self.place, "total": self.total, "targets": self.targets,
            "top": self.top, "waited": self.waited, "history": asdict(self.history),
        }  # fmt: skip
        return tensors, facts

    def last(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state of a job that takes no further step: `restore` and `end` give its kept epoch again."""
        tensors, facts = self.state()
        tensors |= {f"now.{name}": t.clone() for name, t in self.kept.items()}
        return {name: t for name, t in tensors.items() if not name.startswith("optimizer.")}, facts

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Continue from a state."""
        self.adapter.put(_part(tensors, "now."))
        self.kept = {name: t.to(self.base.device) for name, t in _part(tensors, "kept.").items()}
        for i, parameter in enumerate(self._optimized()):
            own = _part(tensors, f"optimizer.{i}.")
            if own:  # the step counter of AdamW lives on the CPU
                self.optimizer.state[parameter] = {
                    name: t.clone() if name == "step" else t.to(parameter.device, copy=True) for name, t in own.items()
                }
        self.history = History(**facts["history"])
        for group, scheduled in zip(self.optimizer.param_groups, self.schedule.base_lrs):
            group["lr"] = scheduled * self.schedule.lr_lambdas[0](self.history.steps)
        self.schedule.last_epoch = self.history.steps
        self.epoch, self.place = facts["epoch"], facts["place"]
        self.total, self.targets = facts["total"], facts["targets"]
        self.top, self.waited = facts["top"], facts["waited"]
        self.order.set_state(tensors["order"])
        self.order_state, self.shuffled = tensors["order"].clone(), None
        if self.place:  # an epoch that takes no further step has drawn its order all the same
            self._shuffled()

    def _optimized(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def make_optimizer(adapter: Adapter, settings: Settings, steps: int, width: int) -> tuple[Any, Any]:
    """AdamW with weight decay on matrices only, and a linear rise and fall of the rate, by part of a union."""
    parts = shares(adapter, width)
    head = {id(p) for p in adapter.head.parameters()} if adapter.head is not None else set()
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for parameter in adapter.parameters():
        times, decays = parts.get(id(parameter), (1.0, True))
        rate = settings.head_lr if id(parameter) in head else settings.lr * times
        decay = settings.weight_decay if decays and parameter.dim() > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    chosen = [{"params": p, "lr": rate, "weight_decay": d} for (rate, d), p in groups.items()]
    # one loop over all values; on a card it would keep its step counters there, where reading them waits
    fused = all(p.device.type == "cpu" for p in adapter.parameters())
    optimizer = torch.optim.AdamW(chosen, fused=fused or None)
    warm = max(1, round(settings.warmup * steps))

    def factor(step: int) -> float:
        return min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

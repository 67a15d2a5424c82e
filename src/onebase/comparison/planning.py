"""`plan`: what each method would cost on a base, against full fine-tuning, before anything is downloaded or trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from onebase.comparison.footprint import ALLOWED, CLASSES, Step, count, make, measure, read_config, shallow, skeleton
from onebase.errors import ConfigError, OnebaseError
from onebase.methods.method import Method
from onebase.methods.registry import method_names, parse_method

FULL = "full fine-tuning"
# What a process takes beside tensors, on a CPU: 27 MB when a base is loaded (tokenizer, Python objects), 42 MB when its
# own head was fitted (solver, data) and 51 MB of freed memory that it keeps (`devices.keep_memory`; 49 to 74 with four
# methods); measured on the embedded base, transformers 5.24, torch 2.13, Linux.
RUNTIME = 120 * 10**6
# Of activations: what kernels need for themselves while they run and what the allocator keeps. Four methods, 64 tokens:
# .24 to .35 of the tensors that were watched.
SLACK = 0.27
ADAM = 2  # moments that AdamW keeps per trained value
# Methods that need words or parts to be named and have no default.
NAMED = ("tokens", "union")
PRESETS = ("bottleneck", "bottleneck(preset='pfeiffer')", "bottleneck(preset='parallel')")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one method costs on a base; bytes, seconds.

    Attributes:
        method: shorthand, or 'full fine-tuning'.
        parameters: trained values, head included.
        share: of the base's values.
        file: bytes of one task's file.
        total: bytes on disk for all tasks: the base once and a file per task, or a model per task.
        weights: the base in memory.
        trained: trained values, their gradients' kept copies and the best epoch so far.
        gradients, optimizer: of the trained values.
        activations: the largest amount that a step holds beside all that; None where it was not measured.
        process: what a training process takes beside its tensors: tokenizer, solver, scratch of kernels, allocator.
        training: memory in training, all together, as the system counts it; None where activations are not known.
        serving: memory to answer for all tasks: one base and every adapter, or every model.
        seconds_per_1000: estimated training time here per 1,000 rows of this length; None where not measured.
        mergeable: whether the change can be written into a copy of the base, and then costs no time.
        refused: why the base cannot carry the method, '' where it can.
    """

    method: str
    parameters: int = 0
    share: float = 0.0
    file: int = 0
    total: int = 0
    weights: int = 0
    trained: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int | None = None
    process: int | None = None
    training: int | None = None
    serving: int = 0
    seconds_per_1000: float | None = None
    mergeable: bool = False
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Costs of methods on one base.

    Attributes:
        base: its name.
        values: its number of parameters.
        layers, width: of it.
        tasks, batch, length: what was asked for.
        costs: one per method, full fine-tuning first.
        notes: what the reader should know.
    """

    base: str
    values: int
    layers: int
    width: int
    tasks: int
    batch: int
    length: int
    costs: tuple[Cost, ...]
    notes: tuple[str, ...] = field(default=())


def plan(
    base: str, *, tasks: int = 1, methods: Sequence[str | Method] = (), batch: int = 32, length: int = 128
) -> Plan:
    """Say what methods cost on a base. Only its config is read: a folder with a config.json is enough.

    Args:
        base: folder or hub id.
        tasks: how many tasks share the base.
        methods: shorthands; by default every method that needs no words of the user's. Full fine-tuning is always
            among them.
        batch: rows of an optimizer step.
        length: tokens of a row.

    Raises:
        UnsupportedError: the weights of the model cannot be had, so nothing can be trained on it.
        ConfigError: no such base, or a number out of range.
    """
    for name, value in (("tasks", tasks), ("batch", batch), ("length", length)):
        if value < 1:
            raise ConfigError(f"{name} = {value!r}: expected at least 1")
    wanted = [parse_method(m) for m in methods if m != "full"] if methods else default_methods()
    config, shown = read_config(base)
    whole = skeleton(config)
    limit = whole.anatomy.stacks[0].position_limit
    if limit is not None and length > limit:
        raise ConfigError(f"length = {length}: {shown} takes at most {limit} tokens")
    values = sum(p.numel() for p in whole.model.parameters())
    bench = _Bench.of(config, values, whole.anatomy.layers, batch, length)
    costs = [_full(whole, values, tasks, bench)]
    costs += [_cost(whole, method, values, tasks, bench) for method in wanted]
    return Plan(
        base=shown, values=values, layers=whole.anatomy.layers, width=whole.anatomy.hidden_size, tasks=tasks,
        batch=batch, length=length, costs=tuple(costs), notes=tuple(bench.notes),
    )  # fmt: skip


def default_methods() -> list[Method]:
    """Return every known method with its defaults, and the three forms of bottlenecks."""
    names = [name for name in method_names() if name not in (*NAMED, "bottleneck")]
    return [parse_method(text) for text in (*PRESETS, *names)]


class _Bench:
    """Copies of the base with one and two layers, on which steps are measured.

    Args:
        copies: the copies, or none where they are too large.
        layers: of the base.
        batch, length: of a step.
        notes: what the reader should know.
    """

    def __init__(self, copies: list[Any], layers: int, batch: int, length: int, notes: list[str]):
        self.copies, self.layers, self.batch, self.length, self.notes = copies, layers, batch, length, notes

    @classmethod
    def of(cls, config: Any, values: int, layers: int, batch: int, length: int) -> _Bench:
        if 4 * values * min(1.0, 2 / max(1, layers)) > ALLOWED:
            note = (
                f"activations and time were not measured: two layers of this base are beyond {ALLOWED / 1e9:.0f} GB, "
                "which planning does not take. Training memory is at least weights + trained + gradients + optimizer."
            )
            return cls([], layers, batch, length, [note])
        try:
            return cls([shallow(config, n) for n in (1, 2)], layers, batch, length, [])
        except (OnebaseError, ValueError, RuntimeError) as error:
            return cls([], layers, batch, length, [f"activations and time were not measured: {error}"])

    def extended(self, one: float, two: float) -> float:
        """Return a quantity of the whole base from that of one and of two layers."""
        return one + (self.layers - 1) * (two - one)

    def step(self, method: Method | None) -> Step | None:
        """Measure one step of a method, None for the base itself."""
        if not self.copies:
            return None
        one, two = (measure(base, method, self.batch, self.length) for base in self.copies)
        return Step(peak=self.extended(one.peak, two.peak), seconds=max(0.0, self.extended(one.seconds, two.seconds)))

    def per_thousand(self, step: Step | None) -> float | None:
        """Return seconds of 1,000 rows."""
        from onebase.comparison.footprint import micro_rows

        if step is None:
            return None
        return step.seconds * 1000 / micro_rows(self.batch, self.length, self.copies[0].device)


def _full(whole: Any, values: int, tasks: int, bench: _Bench) -> Cost:
    trained = values + CLASSES * (whole.anatomy.hidden_size + 1)
    return _with_memory(
        Cost(method=FULL, parameters=trained, share=1.0, file=4 * trained, total=4 * trained * tasks, weights=0,
             serving=4 * trained * tasks), bench.step(None), bench, True,
    )  # fmt: skip


def _cost(whole: Any, method: Method, values: int, tasks: int, bench: _Bench) -> Cost:
    try:
        own, stored = _counted(whole, method, bench)
        step = bench.step(method)
    except OnebaseError as error:
        return Cost(method=method.shorthand(), refused=str(error))
    head = 0 if whole.has_lm_head else CLASSES * (whole.anatomy.hidden_size + 1)
    file = stored + 4 * head
    cost = Cost(
        method=method.shorthand(), parameters=own + head, share=(own + head) / values, file=file,
        total=4 * values + tasks * file, weights=4 * values, serving=4 * values + tasks * file,
        mergeable=method.mergeable,
    )  # fmt: skip
    return _with_memory(cost, step, bench, False)


def _counted(whole: Any, method: Method, bench: _Bench) -> tuple[int, int]:
    """Count a method's values; one that reads weights is counted on the shallow copies."""
    try:
        return count(make(whole, method))
    except (OnebaseError, NotImplementedError):
        if not bench.copies:
            raise
    (own1, file1), (own2, file2) = (count(make(base, method)) for base in bench.copies)
    return round(bench.extended(own1, own2)), round(bench.extended(file1, file2))


def _with_memory(cost: Cost, step: Step | None, bench: _Bench, full: bool) -> Cost:
    import dataclasses

    size = 4 * cost.parameters
    # the trained values themselves, and a copy of the best epoch's
    facts: dict[str, Any] = {"trained": 2 * size, "gradients": size, "optimizer": ADAM * size}
    if step is not None:
        # a step's peak holds the gradients too: what is left is activations
        facts["activations"] = max(0, round(step.peak) - size)
        tensors = cost.weights + 2 * size + size + ADAM * size + facts["activations"]
        # on a GPU the allocator's peak counts, which holds tensors and scratch alone
        runtime = RUNTIME if bench.copies[0].device.type == "cpu" else 0
        facts["process"] = runtime + round(SLACK * facts["activations"])
        facts["training"] = tensors + facts["process"]
        facts["seconds_per_1000"] = bench.per_thousand(step)
    return dataclasses.replace(cost, **facts)

"""Settings of training and their defaults per method."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_type_hints

from onebase.compose.recipes import Composition
from onebase.errors import unknown
from onebase.methods.method import Method, _coerce, check
from onebase.methods.union import Composite, UnionModule

if TYPE_CHECKING:
    from onebase.adapter import Adapter

RESTORE = ("latest", "best")
ATTENTION = ("auto", "eager", "sdpa", "keep")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How one adapter is trained.

    Attributes:
        lr: peak learning rate of the adapter.
        head_lr: peak learning rate of the task head, which starts from the solution on the frozen base.
        epochs: passes over the training rows, at most.
        batch_size: rows per micro-batch.
        accumulate: micro-batches per optimizer step; the effective batch is batch_size * accumulate rows.
        warmup: share of the steps in which the rate rises linearly from 0; then it falls linearly to 0.
        weight_decay: on matrices only; never on biases, norms and virtual tokens.
        clip: largest norm of the gradient, over all parameters of the adapter; 0 for none.
        patience: stop after so many epochs in a row that are worse on validation than the best; 0 never stops.
        restore: which epoch is kept. 'latest': the latest one whose validation score is within one standard error of
            the best one's (the one-standard-error rule of Breiman et al. 1984, towards the end of training, where the
            rate is smallest). Validation rows are few: the best score alone was measured to pick epochs that are worse
            on new rows (cr: .895 against .915 with the last epoch). 'best': the best score. Losses are compared
            exactly in both.
        save_steps: optimizer steps between two checkpoints of a run that will be stored (one more after every epoch).
        seed: of initialisation, order of rows and dropout.
        checkpointing: recompute layers in the backward pass to save memory.
        keep_mb: MiB for states below the lowest layer that the adapter touches, which are computed once and kept for
            all epochs; 0 computes them in every epoch.
        attention: 'auto' measures eager against sdpa on the first rows, or 'eager', 'sdpa', 'keep' (the base's own).
        dtype: of the forward and backward pass of a float32 base: 'auto' measures bfloat16 against float32, or
            'float32', 'bfloat16'. Adapters are float32 always, and results are scored in the base's own dtype.
    """

    lr: float = 5e-4
    head_lr: float = 1e-3
    epochs: int = 5
    batch_size: int = 32
    accumulate: int = 1
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    patience: int = 3
    restore: str = "latest"
    save_steps: int = 50
    seed: int = 0
    checkpointing: bool = False
    keep_mb: int = 1024
    attention: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, least in (("lr", "above 0"), ("head_lr", "above 0"), ("weight_decay", "0"), ("clip", "0")):
            value = getattr(self, name)
            fits = 0 <= value < 1e3 and (value > 0 or least == "0")
            check(fits, f"train.{name}", value, f"a number from {least} to below 1000")
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("accumulate", 1),
            ("patience", 0),
            ("save_steps", 1),
            ("keep_mb", 0),
        ):
            value = getattr(self, name)
            check(isinstance(value, int) and value >= least, f"train.{name}", value, f"an integer of at least {least}")
        check(0 <= self.warmup < 1, "train.warmup", self.warmup, "0 <= share < 1")
        check(0 <= self.seed < 2**63, "train.seed", self.seed, "0 to 2**63 - 1")
        for name, modes in (("attention", ATTENTION), ("dtype", DTYPES), ("restore", RESTORE)):
            check(getattr(self, name) in modes, f"train.{name}", getattr(self, name), f"one of {', '.join(modes)}")

    def plain(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return dataclasses.asdict(self)


# Learning rates at width 384, chosen on the validation rows of cr and trec6 (benchmarks/quality.py, one seed): LoRA
# 2e-3 against 5e-4 and 1e-3; bottleneck 1e-3 against 2e-3, which overfits the smaller set from its second epoch on. The
# published rates for wider bases are lower in proportion: 5e-4 to 1e-3 at 768 (LoRA, Houlsby), 2e-4 at 4096 (QLoRA,
# arXiv 2305.14314).
# Prefixes and prompts are few values that everything depends on, and want far more: 5e-3 flat (P-tuning v2) and 1e-3 to
# 1e-1 with AdamW in the papers; 1e-2 and 5e-2 were best on the validation rows of the demo.
# The rest are published orders of magnitude, not measured here: DoRA below LoRA's (arXiv 2402.09353), half; HiRA above
# LoRA's, because its product with W is a change relative to W (2501.02137); VeRA 4e-3 to 1e-2, ten times LoRA's there
# (2310.11454); AdaLoRA as LoRA (2303.10512); IA3 3e-3 (2205.05638); BitFit 1e-4 to 1e-3 (2106.10199) and LayerNorm
# tuning 1e-3; LoReFT 1e-3 (2404.03592). Trained tokens are input embeddings like prompts, but start from ones that
# work: a fifth of the prompts' rate. AdapterFusion 5e-5 (2005.00247); dense changes as full fine-tuning, 2e-5 to 5e-5.
RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"lr": 2e-3},
    "dora": {"lr": 1e-3},
    "hira": {"lr": 5e-3},
    "vera": {"lr": 1e-2, "weight_decay": 0.0},
    "adalora": {"lr": 2e-3},
    "bottleneck": {"lr": 1e-3},
    "dense": {"lr": 5e-5},
    "fuse": {"lr": 5e-5},
    "ia3": {"lr": 3e-3, "weight_decay": 0.0},
    "bitfit": {"lr": 1e-3, "weight_decay": 0.0},
    "layernorm": {"lr": 1e-3, "weight_decay": 0.0},
    "loreft": {"lr": 1e-3, "weight_decay": 0.0},
    "prefix": {"lr": 1e-2, "weight_decay": 0.0},
    "prompt": {"lr": 5e-2, "weight_decay": 0.0},
    "tokens": {"lr": 1e-2, "weight_decay": 0.0},
}
WIDTH = 384  # where the rates above were measured
SCALED = ("lora", "dora", "hira", "adalora", "bottleneck")  # methods whose rate falls as the base grows wider


def recipe(method: str | Method, width: int = WIDTH) -> dict[str, Any]:
    """Return the training defaults of a method; those of a union have the rate of its slowest part.

    Args:
        method: a method or its name; unknown ones have none of their own.
        width: of the base; the default rate of wide bases is lower, in proportion.
    """
    if isinstance(method, Composition):
        return {} if method.trained is None else recipe(method.trained, width)
    if isinstance(method, Composite):
        return {"lr": min(part_rates(method, width))}
    name = method if isinstance(method, str) else method.name
    found = dict(RECIPES.get(name, {}))
    if name in SCALED and width > WIDTH:
        found["lr"] = float(f"{found['lr'] * WIDTH / width:.2g}")
    return found


def part_rates(method: Composite, width: int) -> list[float]:
    """Return the default rate of each part of a union."""
    return [recipe(part, width).get("lr", Settings.lr) for part in method.members()]


def shares(adapter: Adapter, width: int) -> dict[int, tuple[float, bool]]:
    """Return how parts of a union differ in training: id of a parameter -> (rate over the set one, decays).

    The rate that is set is that of the slowest part; the others keep their default rates' proportion to it.
    """
    if not isinstance(adapter.method, Composite) or not isinstance(adapter.module, UnionModule):
        return {}
    rates, found = part_rates(adapter.method, width), {}
    for part, rate, module in zip(adapter.method.members(), rates, adapter.module.members()):
        decays = recipe(part, width).get("weight_decay", Settings.weight_decay) > 0
        found |= {id(parameter): (rate / min(rates), decays) for parameter in module.parameters()}
    return found


def settings_for(method: str | Method, given: dict[str, Any], width: int = WIDTH) -> Settings:
    """Return the defaults of a method with the caller's own settings on top.

    Args:
        method: the method or its name; unknown ones get the general defaults.
        given: settings by name; None means the default.
        width: of the base; the default rate of wide bases is lower, in proportion.

    Raises:
        UnknownNameError: a setting that does not exist.
        ConfigError: a wrong type or range.
    """
    fields = {f.name for f in dataclasses.fields(Settings)}
    hints = get_type_hints(Settings)
    for name in given:
        if name not in fields:
            raise unknown("training setting", name, fields)
    chosen = {name: _coerce(f"train.{name}", v, hints[name]) for name, v in given.items() if v is not None}
    return Settings(**{**recipe(method, width), **chosen})

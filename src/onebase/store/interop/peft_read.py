"""Read an adapter folder of PEFT: its settings, its tensors, and what they are here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from onebase.errors import ConfigError, CorruptError, UnsupportedError
from onebase.store.interop.foreign import CONFIG, Foreign, most_bytes, read_settings, read_tensors, refuse
from onebase.store.interop.modules import Modules
from onebase.store.interop.peft_config import READ, config_problems, targeted
from onebase.store.interop.peft_delta import known_to_peft

if TYPE_CHECKING:
    from onebase.base import Base

TENSORS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
ROOT = "base_model.model."
# ending of a key -> what it is; the module's path is before it
ENDINGS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".ia3_l": "ia3",
    ".vera_lambda_b": "b",
    ".vera_lambda_d": "d",
    ".ln_tuning_layers.weight": "gamma",
    ".ln_tuning_layers.bias": "beta",
}
PARTS = {
    "LORA": {"A", "B"},
    "IA3": {"ia3"},
    "VERA": {"b", "d"},
    "LN_TUNING": {"gamma"},
}


@dataclass(eq=False)
class PeftFile:
    """A PEFT file, sorted.

    Attributes:
        config: the settings.
        parts: module path of this base -> what -> tensor.
        names: module path of this base -> path in the file.
        whole: tensors of the adapter as a whole, such as ``vera_A``.
        head: other modules that were saved (``classifier.weight``).
        wrong: everything that does not fit.
        notes: see `Foreign`.
        pooler: change of the weight of the pooler that a head reads, (D, D).
    """

    config: dict[str, Any]
    modules: Modules
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pooler: Tensor | None = None

    @property
    def kind(self) -> str:
        """The method, as PEFT calls it."""
        return str(self.config["peft_type"])


def read_peft(folder: Path, base: Base, labels: Iterable[str] = (), rank: int | None = None) -> Foreign:
    """Read a PEFT adapter for a base.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        base: what it is to be attached to.
        labels: names of the classes; the file holds none.
        rank: of the LoRA that a method without a form here becomes; None carries its change exactly.

    Raises:
        ConfigError: a rank, for a method that has a form here.
        UnsupportedError: settings that cannot be carried over, each named.
        CorruptError: a missing, damaged or not finite file.
        MismatchError: tensors that do not fit this base, each named.
    """
    from onebase.store.interop import peft_head, peft_methods

    config = read_settings(folder / CONFIG)
    if config.get("peft_type") not in READ and known_to_peft(str(config.get("peft_type"))):
        return _through_peft(folder, base, config, tuple(labels), rank)
    if rank is not None:
        raise ConfigError(f"rank = {rank!r}: {config.get('peft_type')} is carried exactly as it is; leave rank out")
    refuse(f"{folder} cannot be carried over", config_problems(config), UnsupportedError)
    file = PeftFile(config, Modules(base))
    for key, tensor in read_tensors(folder, TENSORS, PICKLE, most_bytes(base)).items():
        _sort(file, key, tensor.float())
    _check_parts(file)
    _check_targets(file)
    refuse(f"{folder} does not fit this base ({base.id})", file.wrong)
    method, tensors = peft_methods.READERS[file.kind](file)
    refuse(f"{folder} does not fit this base ({base.id})", file.wrong)
    task, head = peft_head.read_head(file, base, tuple(labels))
    refuse(f"{folder} does not fit this base ({base.id})", file.wrong)
    return Foreign(
        format="peft",
        method=method,
        task=task,
        tensors=tensors | head,
        notes=tuple(file.notes),
        made_for=str(config.get("base_model_name_or_path") or ""),
        facts={"peft_version": config.get("peft_version")},
    )


def _through_peft(
    folder: Path, base: Base, config: dict[str, Any], labels: tuple[str, ...], rank: int | None
) -> Foreign:
    """Read a method that has no form here by what the installed peft makes of it."""
    from onebase.store.interop import peft_head
    from onebase.store.interop.peft_delta import read_delta

    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= 512):
        raise ConfigError(f"rank = {rank!r}: expected an integer from 1 to 512")
    file = PeftFile(config, Modules(base))
    tensors = {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in read_tensors(folder, TENSORS, PICKLE, most_bytes(base), numbers=True).items()
    }
    method, found = read_delta(folder, base, file, tensors, rank)
    task, head = peft_head.read_head(file, base, labels)
    refuse(f"{folder} does not fit this base ({base.id})", file.wrong)
    return Foreign(
        format="peft", method=method, task=task, tensors=found | head, notes=tuple(file.notes),
        made_for=str(config.get("base_model_name_or_path") or ""), facts={"peft_version": config.get("peft_version")},
    )  # fmt: skip


def _sort(file: PeftFile, key: str, tensor: Tensor) -> None:
    """Put one tensor of the file where it belongs."""
    if key == "prompt_embeddings":
        file.whole[key] = tensor
        return
    if not key.startswith("base_model."):
        file.wrong.append(f"unexpected tensor {key} {tuple(tensor.shape)}: keys of a PEFT file start with {ROOT}")
        return
    rest = key.removeprefix(ROOT) if key.startswith(ROOT) else key.removeprefix("base_model.")
    rest = rest.replace(".modules_to_save.", ".")
    if rest in ("vera_A", "vera_B"):
        file.whole[rest] = tensor
        return
    for ending, what in ENDINGS.items():
        if rest.endswith(ending):
            path = rest.removesuffix(ending)
            own = file.modules.own(path)
            if own is None and what in ("gamma", "beta"):
                own = None
            if own is None:
                file.wrong.append(f"{key}: this base has no module {path!r}")
                return
            file.parts.setdefault(own, {})[what] = tensor
            file.names[own] = path
            return
    file.head[rest] = tensor


def _check_parts(file: PeftFile) -> None:
    """Note missing and unexpected tensors of single modules."""
    if file.kind not in PARTS:
        file.wrong += [f"unexpected tensors of module {path}: {', '.join(found)}" for path, found in file.parts.items()]
        return
    wanted = set(PARTS[file.kind])
    allowed = wanted | ({"beta"} if file.kind == "LN_TUNING" else set())
    if file.kind == "LORA" and file.config.get("use_dora"):
        wanted, allowed = wanted | {"magnitude"}, allowed | {"magnitude"}
    ending = {what: end for end, what in reversed(ENDINGS.items())}
    for path, found in file.parts.items():
        name = ROOT + file.names[path]
        file.wrong += [f"missing tensor {name}{ending[what]}" for what in sorted(wanted - found.keys())]
        file.wrong += [f"unexpected tensor {name}{ending[what]}" for what in sorted(found.keys() - allowed)]
    if not file.parts and not file.wrong:
        raise CorruptError(f"the file holds no tensor of {file.kind}")


def _check_targets(file: PeftFile) -> None:
    """Compare the modules that the settings name with those that have tensors."""
    wanted, left_out = file.config.get("target_modules"), file.config.get("exclude_modules")
    if file.kind not in PARTS or wanted is None:
        return
    some = file.config.get("layers_to_transform")
    if wanted == "all-linear":
        missing = [path for path in file.modules.linears() if path not in file.parts]
        if not left_out and some is None:
            file.wrong += [f"target_modules = 'all-linear', but {path} has no tensors" for path in missing]
        return
    for name in file.names.values():
        if not _names(file, wanted, name):
            file.wrong.append(f"tensors at {name}, which target_modules = {_short(wanted)} does not name")
    if some is not None or left_out:
        return
    kind = "norm" if file.kind == "LN_TUNING" else "linear"
    for site in file.modules.anatomy.sites.values():
        if site.kind == kind and site.path and site.path not in file.parts and _names(file, wanted, site.path):
            file.wrong.append(f"target_modules = {_short(wanted)} names {site.path}, which has no tensors")


def _names(file: PeftFile, wanted: Any, path: str) -> bool:
    """Whether targets name a module under the name of a bare or of a headed class."""
    inner = path.removeprefix(f"{file.modules.named}.")
    return any(targeted(wanted, name) for name in (path, inner, f"{file.modules.named}.{inner}"))


def _short(value: Any) -> str:
    text = repr(sorted(value) if isinstance(value, list) else value)
    return text if len(text) < 80 else text[:77] + "..."

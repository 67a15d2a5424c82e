"""PEFT methods that have no form of their own here, but whose effect is a change of weights: LoHa, LoKr, OFT, BOFT ...

The installed peft computes the change: it wraps a copy of the base, reads the file, and merges. What the weights have
gained is the adapter, as a LoRA where that is exact and smaller, as a dense change otherwise, or as the nearest LoRA
of a rank. That the merged copy answers as the wrapped one proves that the effect is a change of weights.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.core.site import Site
from onebase.errors import UnsupportedError
from onebase.methods.dense import Dense
from onebase.methods.lora import LoRA, low_rank
from onebase.methods.method import Method
from onebase.store.interop.foreign import refuse
from onebase.store.interop.peft_config import NO_FORM

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.store.interop.peft_read import PeftFile

ROOT = "base_model.model."
EQUAL = 1e-4  # of answers of the wrapped and the merged copy, relative to the largest
SMALL = 4096  # a size that may stand in the settings whatever the tensors are: ranks, blocks, counts
NO_SIZE = ("seed", "prng", "step", "tinit", "tfinal", "deltat", "version")  # settings that are numbers and no sizes
EXACT = 1e-6  # relative error up to which a LoRA is the change: rounding of float32


def known_to_peft(kind: str) -> bool:
    """Whether the installed peft has a method of this name that changes weights."""
    if kind in NO_FORM:
        return False
    try:
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
        from peft.utils import PeftType
    except ImportError:
        return False
    return kind in PeftType.__members__ and hasattr(PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType[kind]), "merge_and_unload")


def read_delta(folder: Path, base: Base, file: PeftFile, tensors: dict[str, Tensor], rank: int | None) -> tuple[
    Method, dict[str, Tensor]
]:  # fmt: skip
    """Return method and tensors of a file that peft itself reads; what is no part of its method goes to `file.head`.

    Args:
        folder: of the adapter.
        base: what it is for; a copy of its model is made for the time of reading.
        file: receives problems, notes and the tensors of a head.
        tensors: of the file, checked to be finite.
        rank: of the LoRA to make of it; None keeps the exact change.

    Raises:
        UnsupportedError: peft cannot read or merge it on this base, or it is no change of weights.
        MismatchError: tensors that do not fit, each named.
    """
    _check_sizes(folder, file.config, tensors)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # peft's, on what is checked here
        merged = _merged(folder, base, file, tensors)
        return _as_method(file, _changes(base, file, merged), rank)


def _merged(folder: Path, base: Base, file: PeftFile, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a copy of the base with the adapter merged."""
    import copy

    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    model = type(base.model)(copy.deepcopy(base.model.config))
    model.load_state_dict(base.model.state_dict())
    model.float().eval()
    with _asking(file, folder, "read the settings of"):
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode, config.task_type, config.modules_to_save = True, None, None  # type: ignore[attr-defined]
    with _asking(file, folder, "put", " on this base"):
        wrapped = get_peft_model(model, config)
    own = {_inner(file, key): (key, tensor.shape) for key, tensor in get_peft_model_state_dict(wrapped).items()}
    given: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        place = own.get(_inner(file, key))
        if place is None:
            file.head[key.removeprefix(ROOT).removeprefix("base_model.").replace(".modules_to_save.", ".")] = tensor
        elif place[1] != tensor.shape:
            file.wrong.append(f"{key}: shape {tuple(tensor.shape)}, this base needs {tuple(place[1])}")
        else:
            given[place[0]] = tensor
    file.wrong += [f"missing tensor {key}" for key, _ in own.values() if key not in given]
    refuse(f"{folder} does not fit this base ({base.id})", file.wrong)
    with _asking(file, folder, "run"):
        set_peft_model_state_dict(wrapped, given)
        wrapped.eval()
        before = _answer(base, wrapped)
    with _asking(file, folder, "merge"):
        whole: Any = wrapped.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    after = _answer(base, whole)
    gap, size = float((before - after).abs().max()), float(before.abs().max())
    if not gap <= EQUAL * max(1.0, size):
        raise UnsupportedError(
            f"{folder}: {file.kind} is no change of weights: merged it answers differently by {gap:.3g} (of {size:.3g})"
        )
    return {name: tensor.detach() for name, tensor in whole.state_dict().items()}


@contextmanager
def _asking(file: PeftFile, folder: Path, what: str, where: str = "") -> Iterator[None]:
    """Turn whatever peft raises into one error: its forty methods raise of every kind, and none is a fault here."""
    try:
        with torch.sparse.check_sparse_tensor_invariants():  # places from a file, which could lie outside of a matrix
            yield
    except MemoryError:
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
        raise UnsupportedError(f"{folder}: peft cannot {what} {file.kind}{where}: {said}") from error


def _check_sizes(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse settings that ask for more memory than the file's own tensors have, before peft makes any of it."""
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)

    def numbers(values: Any, name: str) -> Iterator[tuple[str, int]]:
        if isinstance(values, Mapping):
            for key, value in values.items():
                yield from numbers(value, str(key) if not name else f"{name}.{key}")
        elif isinstance(values, int) and not any(word in name.lower() for word in NO_SIZE):
            yield name, values

    wrong = [f"{name} = {n}: no tensor of the file has more than {largest} rows or columns"
             for name, n in numbers(config, "") if n > max(largest, SMALL)]  # fmt: skip
    refuse(f"{folder} does not hold what its settings say", wrong)


def _inner(file: PeftFile, key: str) -> str:
    """Return a key without what a headed or a bare class puts before its modules."""
    rest = key.removeprefix(ROOT)
    for name in (file.modules.prefix, file.modules.named):
        if name and rest.startswith(f"{name}."):
            return rest.removeprefix(f"{name}.")
    return rest


def _answer(base: Base, model: Any) -> Tensor:
    size = int(base.anatomy.stacks[0].embed.weight.shape[0])  # type: ignore[union-attr,arg-type,index]
    ids = torch.arange(24, device=base.device).reshape(2, 12) % max(1, size - 8) + 4
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if base.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    found = model.to(base.device)(**inputs)
    return found.logits if "logits" in found else found.last_hidden_state


def _changes(base: Base, file: PeftFile, merged: dict[str, Tensor]) -> dict[str, tuple[Site, Tensor, Tensor | None]]:
    """Return site name -> (site, change of W, change of b or None) of everything that is not as it was."""
    changed: dict[str, dict[str, Tensor]] = {}
    for name, now in merged.items():
        then = base.model.state_dict()[name]
        if now.is_floating_point() and not torch.equal(now, then.to(now)):
            path, _, what = name.rpartition(".")
            changed.setdefault(path, {})[what] = now - then.to(now)
    found: dict[str, tuple[Site, Tensor, Tensor | None]] = {}
    for path, what in changed.items():
        reason = file.modules.covered(path)
        if reason:
            file.wrong.append(f"{path}: {reason}")
            continue
        module = file.modules.get(path)
        weight = what.get("weight", torch.zeros_like(module.weight))  # type: ignore[arg-type]
        if type(module).__name__ == "Conv1D":
            weight = weight.t()
        for site in file.modules.sites(path, "linear"):
            bias = what.get("bias")
            found[site.name] = (site, site.take(weight, 0), None if bias is None else site.take(bias, 0))
    refuse("the file changes what onebase does not adapt", file.wrong, UnsupportedError)
    if not found:
        raise UnsupportedError(f"this {file.kind} file changes no weight: it was saved before any training")
    return found


def _as_method(
    file: PeftFile, changes: dict[str, tuple[Site, Tensor, Tensor | None]], rank: int | None
) -> tuple[Method, dict[str, Tensor]]:
    import re

    names = tuple(f"re:^{re.escape(name)}$" for name in changes)
    bias = any(b is not None for _, _, b in changes.values())
    if rank is not None and bias:
        raise UnsupportedError("the file changes biases, which no LoRA holds: leave rank out")
    wanted = rank or (None if bias else _exact_rank(changes))
    tensors: dict[str, Tensor] = {}
    if wanted is None:
        for name, (site, weight, own) in changes.items():
            tensors[f"deltas.{name}.weight"] = weight.contiguous().clone()
            if bias:
                tensors[f"deltas.{name}.bias"] = torch.zeros(site.d_out) if own is None else own.clone()
        file.notes.append(f"{file.kind} is carried as the dense change of weights that it makes: the same function")
        return Dense(sites=names, bias=bias), tensors
    worst, ranks = 0.0, {}
    for key, (name, (_, weight, _)) in zip(names, changes.items()):
        delta, error = low_rank(weight, wanted)
        worst = max(worst, error)
        tensors[f"deltas.{name}.A"], tensors[f"deltas.{name}.B"] = delta.A.detach(), delta.B.detach()
        if len(delta.A) != wanted:
            ranks[key] = len(delta.A)
    exact = f"{file.kind} is carried as a LoRA of rank {wanted}"
    file.notes.append(
        f"{exact}: the same function"
        if rank is None
        else f"{exact}: at most {worst:.3g} of the norm of a change is lost"
    )
    alphas = {key: float(r) for key, r in ranks.items()}
    return LoRA(rank=wanted, alpha=float(wanted), sites=names, ranks=ranks, alphas=alphas), tensors


def _exact_rank(changes: dict[str, tuple[Site, Tensor, Tensor | None]]) -> int | None:
    """Return the rank at which a LoRA is every change exactly and smaller, or None."""
    rank, dense = 1, 0
    for _, weight, _ in changes.values():
        s = torch.linalg.svdvals(weight.float())
        left = s.square().flip(0).cumsum(0).flip(0).sqrt()  # what is lost when this value and those behind it go
        rank = max(rank, int((left > EXACT * float(left[0])).sum()))
        dense += weight.numel()
    smaller = rank * sum(sum(weight.shape) for _, weight, _ in changes.values()) < dense
    return rank if smaller and rank <= 512 else None

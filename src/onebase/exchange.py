"""Attach adapters that other libraries wrote, and write ours as theirs, each checked by what it answers."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.adapter import Adapter, problems
from onebase.build import build_adapter, default_task
from onebase.encode import collate, encode_texts, pad_id
from onebase.errors import ConfigError, CorruptError, MismatchError, OnebaseError, StoreError, UnsupportedError, unknown
from onebase.store.interop.foreign import CONFIG, Foreign, read_settings
from onebase.store.names import clean_name
from onebase.storing import PROBES, TOLERANCE

if TYPE_CHECKING:
    from onebase.base import Base

FORMATS = ("peft", "vllm", "adapterhub", "merged", "onnx")
# Formats that only their own projects can write rightly, with converters that no package has.
CONVERTERS = {
    "gguf": "llama.cpp's own, which is in no package. A full model: onebase merge NAME --out MODEL, then python "
    "convert_hf_to_gguf.py MODEL. A LoRA: onebase export NAME --to peft --no-head --out LORA, then python "
    "convert_lora_to_gguf.py --base BASE LORA. Both are in a checkout of llama.cpp and need pip install gguf",
}
# What is fetched of a hub repository, and nothing else; pickles are fetched to be refused by name.
FILES = (
    "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "adapter.safetensors",
    "pytorch_adapter.bin", "head_config.json", "model_head.safetensors", "pytorch_model_head.bin",
)  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Where an adapter of another library lies: its folder, its name, and the commit where a hub gave it."""

    folder: Path
    name: str
    revision: str = ""


def find_folder(source: str | Path) -> Source:
    """Return the folder of an adapter: a local one, or a hub repository fetched to the cache.

    Args:
        source: a folder, ``owner/name``, or ``owner/name@REVISION`` with a commit, branch or tag.

    Raises:
        ConfigError: there is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Source(folder, folder.name)
    repo, at, revision = str(source).partition("@")
    if at and not revision:
        raise ConfigError(f"{str(source)!r} ends in '@': write {repo!r} for the main branch, or {repo}@COMMIT")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(repo, revision=revision or None, allow_patterns=list(FILES)))
        return Source(found, clean_name(repo.rpartition("/")[2]), found.name)  # a snapshot is named by its commit
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"{source} is no folder, and the hub answered: {first}") from error


def read_foreign(base: Base, folder: Path, labels: Sequence[str] = (), rank: int | None = None) -> Foreign:
    """Read an adapter folder of another library, whichever it is.

    Raises:
        UnsupportedError, CorruptError, MismatchError: as `read_peft` and `read_adapterhub`.
    """
    try:
        return _read_foreign(base, folder, labels, rank)
    except (OnebaseError, torch.OutOfMemoryError):
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, OverflowError) as error:
        raise CorruptError(
            f"{folder}: its settings or tensors are of a kind that no library writes ({type(error).__name__}: "
            f"{str(error)[:200]}). Take the folder from its source again."
        ) from error


def _read_foreign(base: Base, folder: Path, labels: Sequence[str], rank: int | None) -> Foreign:
    config = read_settings(folder / CONFIG)
    if config.get("library") == "onebase":
        raise ConfigError(f"{folder} is an adapter of onebase: base.load({str(folder)!r}) loads it, verified")
    if "peft_type" in config:
        from onebase.store.interop.peft_read import read_peft

        return read_peft(folder, base, labels, rank)
    if rank is not None:
        raise ConfigError(f"rank = {rank!r} is for files of PEFT: leave it out")
    if "config" in config and "model_type" in config:
        from onebase.store.interop.adapterhub_read import read_adapterhub

        return read_adapterhub(folder, base, labels)
    raise UnsupportedError(
        f"{folder / CONFIG} is neither PEFT's (it has no 'peft_type') nor of the AdapterHub (no 'config' and "
        "'model_type')"
    )


def import_adapter(
    base: Base, source: str | Path, name: str | None, labels: Sequence[str] = (), rank: int | None = None
) -> Adapter:
    """Attach an adapter of another library; see `Base.import_adapter`."""
    found = find_folder(source)
    folder, name = found.folder, name or found.name
    if name in base.adapters:
        raise ConfigError(f"adapter name {name!r} is taken: remove it first, or import with another name=")
    foreign = read_foreign(base, folder, labels, rank)
    adapter = attach_foreign(base, foreign, name)
    adapter.config = {
        "provenance": {
            "imported": {"format": foreign.format, "source": str(source), "made for": foreign.made_for,
                         "unverified": True, **({"revision": found.revision} if found.revision else {}),
                         **{key: value for key, value in foreign.facts.items() if value is not None}},
            **({"notes": list(foreign.notes)} if foreign.notes else {}),
        }
    }  # fmt: skip
    return adapter


def attach_foreign(base: Base, foreign: Foreign, name: str) -> Adapter:
    """Build the adapter that a foreign file describes, and attach it.

    Raises:
        CorruptError, MismatchError: its tensors are not what the method needs on this base.
    """
    task: dict[str, Any] = {**default_task(base), **foreign.task}
    adapter = build_adapter(base, name, foreign.method, task, 0, empty=True)
    adapter.module.fit({key: tensor.shape for key, tensor in foreign.tensors.items()})
    adapter.bind()
    wrong = problems(adapter.tensors(), foreign.tensors)
    if wrong:
        error = CorruptError if any("NaN" in line for line in wrong) else MismatchError
        raise error(
            f"the {foreign.format} file does not fit {foreign.method.name} on {base.id}:\n  - " + "\n  - ".join(wrong)
        )
    adapter.put(foreign.tensors)
    adapter.train(False)
    return base._attach(adapter)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        format: one of `FORMATS`.
        gap: largest difference of an answer to the probes between the adapter and what was written.
        size: largest answer.
        probes: probe texts that were compared.
        notes: conversions and what the format does not hold.
    """

    folder: Path
    format: str
    gap: float
    size: float
    probes: int
    notes: tuple[str, ...] = ()


def export_adapter(base: Base, name: str, folder: str | Path, to: str, head: bool) -> Exported:
    """Write an attached adapter in the form of another library; see `Base.export`."""
    adapter, folder = base.adapters[name], Path(folder)
    head = head and adapter.head is not None and to not in ("merged", "onnx")
    check_format(to)
    if to == "onnx":
        from onebase.store.interop.onnx import check_onnx

        check_onnx(base)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(f"{folder} is not empty: choose a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as work:
        inner = Path(work) / "out"
        inner.mkdir()
        before = answers(base, name, head)
        notes = _write(base, adapter, inner, to, head)
        if to == "onnx":
            after = _answers_of_onnx(base, inner)
        else:
            after = _answers_of_model(base, inner) if to == "merged" else _answers_of(base, adapter, inner, head)
        gap, size = compare(before, after)
        dtype = next(base.model.parameters()).dtype
        allowed = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) * max(1.0, size)
        if not gap <= allowed:
            raise StoreError(
                f"what was written as {to} answers differently: by {gap:.3g}, allowed {allowed:.3g}. Nothing was kept "
                f"in {folder}. This is a fault of onebase, not of the adapter."
            )
        if folder.exists():
            folder.rmdir()
        shutil.move(str(inner), folder)
    return Exported(folder=folder, format=to, gap=gap, size=size, probes=len(PROBES), notes=tuple(notes))


def check_format(to: str) -> None:
    """Raise UnknownNameError or UnsupportedError unless adapters can be written as `to`."""
    if to in CONVERTERS:
        raise UnsupportedError(f"{to} files are made by a converter of their own: {CONVERTERS[to]}")
    if to not in FORMATS:
        raise unknown("format to export to", to, (*FORMATS, *CONVERTERS))


def _write(base: Base, adapter: Adapter, folder: Path, to: str, head: bool) -> list[str]:
    from onebase.store.interop.peft_write import write_peft

    if to == "merged":
        return _write_merged(base, adapter, folder)
    if to == "onnx":
        return _write_onnx(base, adapter, folder)
    if to == "vllm":
        from onebase.store.interop.vllm import write_vllm

        return write_vllm(base, adapter, folder, head)
    if to == "adapterhub":
        from onebase.store.interop.adapterhub_write import write_adapterhub

        return write_adapterhub(base, adapter, folder, head)
    return write_peft(base, adapter, folder, head)


def _write_merged(base: Base, adapter: Adapter, folder: Path) -> list[str]:
    """Write the full model with the adapter in its weights, and the tokenizer."""
    base.merge(adapter.name)
    try:
        base.model.save_pretrained(folder)
    finally:
        base.unmerge()
    if base.tokenizer is not None:
        base.tokenizer.save_pretrained(folder)
    notes = [f"transformers loads it as {type(base.model).__name__}"]
    if adapter.head is not None:
        notes.append(f"the {adapter.task['kind']} head is no weight of the base, so the model does not hold it")
    return notes


def _write_onnx(base: Base, adapter: Adapter, folder: Path) -> list[str]:
    """Write the merged model as ONNX, beside its config and tokenizer."""
    from onebase.store.interop.onnx import write_onnx

    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        notes = _write_merged(base, adapter, Path(work))
        model = type(base.model).from_pretrained(work, dtype=torch.float32).eval()  # without hooks of ours
        write_onnx(model, folder, int(base.anatomy.stacks[0].embed.weight.shape[0]))  # type: ignore[union-attr,arg-type,index]
        for file in Path(work).iterdir():
            if file.suffix != ".safetensors":
                shutil.move(str(file), folder / file.name)
    notes[0] = f"onnxruntime computes what {type(base.model).__name__} does, from input_ids and attention_mask"
    return notes


def _answers_of_onnx(base: Base, folder: Path) -> list[Tensor]:
    """Let onnxruntime answer the probes."""
    from onebase.store.interop.onnx import FILE, answers_of

    batch = probe_batch(base)
    ids, mask = batch["input_ids"].cpu(), batch["attention_mask"].cpu()
    return [answers_of(folder / FILE, [(ids, mask)])[0][mask.bool()].float().to(base.device)]


def _answers_of_model(base: Base, folder: Path) -> list[Tensor]:
    """Load a written model as any program would, and ask it."""
    from onebase.base import Base as Plain

    model = type(base.model).from_pretrained(folder, dtype=next(base.model.parameters()).dtype)
    with Plain(model.to(base.device), base.tokenizer) as other:
        return answers(other, None)


def _answers_of(base: Base, adapter: Adapter, folder: Path, head: bool) -> list[Tensor]:
    """Attach what was written beside the adapter, ask it, and take it away again."""
    name = f"{adapter.name} (as written)"
    labels = adapter.labels if head else ()
    attach_foreign(base, read_foreign(base, folder, labels), name)
    try:
        return answers(base, name, head)
    finally:
        base.remove(name)


def answers(base: Base, name: str | None, head: bool = True) -> list[Tensor]:
    """Return what the model, and the adapter's head, make of the probes."""
    batch = probe_batch(base)
    inputs: dict[str, Any] = {key: batch[key] for key in ("input_ids", "attention_mask")}
    if base.is_encoder_decoder:
        inputs["decoder_input_ids"] = batch["input_ids"][:, :3]
    if base.anatomy.stacks[-1].causal:
        inputs["use_cache"] = False
    with torch.no_grad(), base.use(name):
        output = base.model(**inputs)
    real = batch["attention_mask"].bool()
    values = output.logits if "logits" in output else output.last_hidden_state
    found = [values.float() if base.is_encoder_decoder else values[real].float()]
    if name is not None and head and base.adapters[name].head is not None:
        with torch.no_grad():
            found += [value.float() for value in base.outputs(batch, [name] * len(real))]
    return found


def probe_batch(base: Base) -> dict[str, Tensor]:
    """Return the probes as a batch; a base without tokenizer gets made-up ids."""
    if base.tokenizer is None:
        ids = torch.arange(4, 4 + 24, device=base.device).reshape(2, 12) % base.anatomy.stacks[0].embed.weight.shape[0]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows = encode_texts(base.tokenizer, {**default_task(base), "template": ""}, PROBES, None)
    return collate(rows, pad_id(base.tokenizer), device=base.device)


def compare(one: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[float, float]:
    """Return the largest difference and the largest value of answers."""
    if [t.shape for t in one] != [t.shape for t in other]:
        return float("inf"), 0.0
    gaps = [float((a.cpu() - b.cpu()).abs().max()) for a, b in zip(one, other)]
    return max(gaps), max(float(t.abs().max()) for t in one)

"""Between an attached adapter and its stored folder: what is written, and every check before it is trusted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.adapter import Adapter
from onebase.compose.kept import check_kept
from onebase.compose.recipes import Composition
from onebase.encode import collate, encode_texts, pad_id
from onebase.errors import ConfigError, CorruptError, MismatchError, StoreError
from onebase.pictures import digest_processor, noise
from onebase.rebuild import explained, rebuild
from onebase.tasks import get_task
from onebase.tasks.spec import spec_problems

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.store import Store, Stored

# Neutral sentences: a probe travels with the adapter, so it must hold nothing of the user's.
PROBES = (
    "The meeting starts at nine and ends before noon.",
    "Le train de Lyon arrive sur la voie deux.",
    "Nothing about this was easy, and yet it worked.",
    "Please sign the form and send it back by Friday.",
)
KEPT = 8  # values kept per probe: enough to notice a change, small enough to read
# Largest accepted difference of a probe value, relative to the largest value: rounding of the dtype through the
# layers of a base, with room for another processor's order of summation.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 1.5e-1}

_verified: set[tuple[str, str, str, str]] = set()  # (digest, base, dtype, device) whose probes agreed


def probe(base: Base, adapter: Adapter) -> dict[str, Any]:
    """Run the probes through an attached adapter.

    Returns:
        {"values": per probe text up to 8 numbers: label logits, or evenly spaced logits of the next token}; empty
        without a tokenizer. On a base that reads images the probes are noise, which any machine draws alike.
    """
    if base.reads_images:
        pixels = noise(base, len(PROBES), torch.Generator().manual_seed(0))
        with torch.no_grad():
            return _kept(base.outputs({"pixel_values": pixels}, [adapter.name] * len(PROBES)))
    if base.tokenizer is None:
        return {}
    pairs = PROBES[::-1] if adapter.task.get("pair") else None
    rows = encode_texts(adapter.tokenizer or base.tokenizer, {**adapter.task, "template": ""}, PROBES, pairs)
    batch = collate(rows, pad_id(base.tokenizer), device=base.device)
    with torch.no_grad():
        if get_task(adapter.task["kind"]).surface_of(adapter.task) == "states":
            values = base.outputs(batch, [adapter.name] * len(rows))
            # outputs per token: those of padding depend on the kernel
            values = [(v[: len(row.ids)] if v.dim() > 1 else v).flatten() for v, row in zip(values, rows)]
        else:
            inputs: dict[str, Any] = {k: batch[k] for k in ("input_ids", "attention_mask")}
            if base.is_encoder_decoder:
                inputs["decoder_input_ids"] = batch["input_ids"][:, :1]
            with base.use(adapter.name):
                if base.anatomy.stacks[-1].causal:
                    inputs["use_cache"] = False
                logits = base.model(**inputs).logits
            last = (
                torch.zeros_like(batch["attention_mask"][:, 0])
                if base.is_encoder_decoder
                else batch["attention_mask"].sum(1) - 1
            )
            values = list(logits[torch.arange(len(rows), device=logits.device), last])
    return _kept(values)


def _kept(values: Sequence[Tensor]) -> dict[str, Any]:
    kept = [value[:: max(1, len(value) // KEPT)][:KEPT].float().cpu().tolist() for value in values]
    return {"values": [[round(v, 5) for v in row] for row in kept]}


def digest_reader(base: Base) -> str | None:
    """Return the hash of what turns inputs into what the base reads: its tokenizer or image processor; None without."""
    from onebase.store import digest_tokenizer

    if base.reads_images:
        return None if base.processor is None else digest_processor(base.processor)
    return None if base.tokenizer is None else digest_tokenizer(base.tokenizer)


def describe(base: Base, adapter: Adapter, **facts: Any) -> dict[str, Any]:
    """Return the fields of a stored config for an attached adapter (see `store.schema.AdapterConfig`)."""
    from onebase.store import digest_config

    reader = digest_reader(base)
    if reader is None:
        what = "image processor, which makes pixels of pictures" if base.reads_images else "tokenizer, which cuts texts"
        raise ConfigError(f"storing an adapter needs the base's {what}: pass it to Base(model, ...)")
    return {
        "method": {"name": adapter.method.name, "settings": adapter.method.settings()},
        "task": dict(adapter.task),
        "base": {
            "id": base.id,
            "fingerprint": base.fingerprint(),
            "model_type": base.anatomy.model_type,
            "hidden_size": base.anatomy.hidden_size,
            "layers": base.anatomy.layers,
            "config_digest": digest_config(base.model.config),
            "parameters": sum(p.numel() for p in base.model.parameters()),
        },
        "tokenizer": {"digest": reader},
        "provenance": {
            **(facts.get("provenance") or {}),
            **({"quantization": base.quantization} if base.quantization else {}),
        },
        "metrics": dict(facts.get("metrics") or {}),
        "probes": probe(base, adapter),
        "parameters": adapter.count(),
    }


def save_adapter(base: Base, adapter: Adapter, store: Store | None, as_name: str | None, **facts: Any) -> Stored:
    """Store an attached adapter as the next version of its name."""
    from onebase.store import Store, remember_base

    imported = adapter.config.get("provenance", {}) if not adapter.digest else {}
    facts["provenance"] = {**imported, **(facts.get("provenance") or {})}

    store = store or Store()
    if isinstance(adapter.method, Composition):
        check_kept(adapter.method, store)
    stored = _write(base, adapter, store, as_name or adapter.name, **facts)
    folder = Path(str(getattr(base.model.config, "_name_or_path", "") or ""))
    if "/" not in base.id and folder.is_absolute() and folder.is_dir():  # an id with a slash finds itself
        remember_base(store.root, stored.config.base.fingerprint, folder)
    adapter.ref, adapter.digest = stored.ref, stored.digest
    adapter.config = stored.config.model_dump(mode="json")
    return stored


def _write(base: Base, adapter: Adapter, store: Store, name: str, **facts: Any) -> Stored:
    """Write an attached adapter as a new version; the adapter stays as it is."""
    tensors = {key: t.cpu().contiguous() for key, t in adapter.folded_tensors().items()}
    return store.save(name, config=describe(base, adapter, **facts), tensors=tensors)


def export_folder(base: Base, adapter: Adapter, folder: Path, **facts: Any) -> None:
    """Write an attached adapter to a folder of its own: a copy, not a version of a store.

    Args:
        base, adapter: what is written.
        folder: new or empty.
        facts: provenance and metrics to keep with it.

    Raises:
        StoreError: the folder has files already.
    """
    import shutil
    import tempfile

    from onebase.store import Store

    folder = Path(folder)
    if isinstance(adapter.method, Composition):
        check_kept(adapter.method, Store())  # a folder is loaded with the default store beside it
    if folder.exists() and any(folder.iterdir()):
        raise StoreError(f"{folder} is not empty: choose a new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        stored = _write(base, adapter, Store(Path(work)), adapter.name, **facts)
        folder.mkdir(exist_ok=True)
        for file in stored.path.iterdir():
            shutil.move(str(file), folder / file.name)


def load_adapter(base: Base, ref: str, name: str | None, store: Store | None, verify: bool) -> Adapter:
    """Attach a stored adapter after every check; see `Base.load`."""
    from onebase.store import Store

    stored = (store or Store()).resolve(ref)
    name = name or stored.name
    if name in base.adapters:
        stored.verify()
        check_base(base, stored, verify)
        if base.adapters[name].digest == stored.digest:
            return base.adapters[name]
        raise ConfigError(f"adapter name {name!r} is taken: remove it first, or load with another name=")
    return attach_stored(base, build_stored(base, name, stored, store, verify), stored, verify)


def build_stored(base: Base, name: str, stored: Stored, store: Store | None = None, verify: bool = True) -> Adapter:
    """Read and check a stored adapter and build it for a base, without attaching it; errors as of `Base.load`."""
    tensors = stored.tensors()
    check_base(base, stored, verify)
    config = stored.config.model_dump(mode="json")
    wrong = [*spec_problems(config["task"], base.anatomy.stacks[0].position_limit), *_probe_problems(config["probes"])]
    if wrong:
        raise CorruptError(f"{stored.ref} cannot be used:\n  - " + "\n  - ".join(wrong))
    adapter = rebuild(base, name, stored, tensors, store)
    adapter.ref, adapter.digest, adapter.config = stored.ref, stored.digest, config
    adapter.train(False)
    return adapter


def attach_stored(base: Base, adapter: Adapter, stored: Stored, verify: bool = True) -> Adapter:
    """Attach what `build_stored` made; it is detached again when its probes are answered otherwise."""
    base._attach(adapter)
    if verify:
        try:
            with explained(stored, "probes or task"):
                _check_probes(base, adapter, adapter.config["probes"])
        except BaseException:
            base.remove(adapter.name)
            raise
    return adapter


def check_base(base: Base, stored: Stored, verify: bool) -> None:
    """Raise one error with everything that differs between the adapter's base and this one."""
    made, wrong = stored.config.base, []
    if made.model_type != base.anatomy.model_type:
        wrong.append(f"model type: made for {made.model_type}, this base is {base.anatomy.model_type}")
    for field, own in (("hidden_size", base.anatomy.hidden_size), ("layers", base.anatomy.layers)):
        if getattr(made, field) != own:
            wrong.append(f"{field}: made for {getattr(made, field)}, this base has {own}")
    then, now = str(stored.config.provenance.get("quantization", "")), base.quantization
    if not wrong and then != now:
        wrong.append(
            f"quantization: made for a base {f'in {then}' if then else 'without any'}, this base is "
            f"{f'in {now}' if now else 'not quantized'}. Quantized weights are other weights, and an adapter corrects "
            f"the errors of its own: load_base({made.id!r}, quantize={then or None!r})"
        )
    if not wrong and made.fingerprint != base.fingerprint():
        wrong.append(
            f"weights: made for {made.id} ({made.fingerprint[:19]}...), this base is {base.fingerprint()[:19]}..."
        )
    reader = digest_reader(base) if verify else None
    if reader is not None and stored.config.tokenizer.digest != reader:
        what = "image processor" if base.reads_images else "tokenizer"
        wrong.append(f"{what}: the adapter was trained with another one (verify=False skips this check and the probes)")
    if wrong:
        raise MismatchError(
            f"{stored.ref} was made for another base:\n  - "
            + "\n  - ".join(wrong)
            + f"\nLoad the base {made.id!r} instead."
        )


def _probe_problems(stored: dict[str, Any]) -> Iterator[str]:
    rows = stored.get("values") or []
    numbers = (int, float)
    if not isinstance(rows, list) or not all(
        isinstance(row, list) and all(type(value) in numbers for value in row) for row in rows
    ):
        yield "probes: expected values as lists of numbers"


def _check_probes(base: Base, adapter: Adapter, stored: dict[str, Any]) -> None:
    """Compare what the adapter answers here with what it answered when it was stored."""
    if not stored.get("values") or (base.tokenizer is None and not base.reads_images):
        return
    dtype = next(base.model.parameters()).dtype
    key = (adapter.digest, base.fingerprint(), str(dtype), base.device.type)
    if key in _verified:
        return
    answers = (stored["values"], probe(base, adapter)["values"])
    then, now = (torch.tensor([value for row in rows for value in row]) for rows in answers)
    allowed = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16]) * max(1.0, float(then.abs().max()))
    gap = float((then - now).abs().max()) if then.shape == now.shape else float("inf")
    if not gap <= allowed:
        raise MismatchError(
            f"{adapter.ref} answers differently here: a probe differs by {gap:.3g}, allowed {allowed:.3g} in {dtype}. "
            "The base, the library or the file is not what it was trained with; load with verify=False to look at it."
        )
    _verified.add(key)

"""Attach adapters that other libraries wrote, and write ours as theirs, each checked by what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.adapter import Adapter, problems
from onebase.build import build_adapter, default_task
from onebase.errors import ConfigError, CorruptError, MismatchError, UnsupportedError
from onebase.store.interop.foreign import CONFIG, Foreign, read_settings

if TYPE_CHECKING:
    from onebase.base import Base

FILES = ("*.json", "*.safetensors", "*.bin")  # of a hub repository; pickles are fetched to be refused by name


def find_folder(source: str | Path) -> Path:
    """Return the folder of an adapter: a local one, or a hub repository fetched to the cache.

    Raises:
        ConfigError: there is neither.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"{source} is no folder, and the hub answered: {first}") from error


def read_foreign(base: Base, folder: Path, labels: Sequence[str] = ()) -> Foreign:
    """Read an adapter folder of another library, whichever it is.

    Raises:
        UnsupportedError, CorruptError, MismatchError: as `read_peft` and `read_adapterhub`.
    """
    config = read_settings(folder / CONFIG)
    if config.get("library") == "onebase":
        raise ConfigError(f"{folder} is an adapter of onebase: base.load({str(folder)!r}) loads it, verified")
    if "peft_type" in config:
        from onebase.store.interop.peft_read import read_peft

        return read_peft(folder, base, labels)
    raise UnsupportedError(
        f"{folder / CONFIG} is neither PEFT's (it has no 'peft_type') nor of the AdapterHub (no 'config' and 'model_type')"
    )


def import_adapter(base: Base, source: str | Path, name: str | None, labels: Sequence[str] = ()) -> Adapter:
    """Attach an adapter of another library; see `Base.import_adapter`."""
    folder = find_folder(source)
    name = name or folder.name
    if name in base.adapters:
        raise ConfigError(f"adapter name {name!r} is taken: remove it first, or import with another name=")
    foreign = read_foreign(base, folder, labels)
    adapter = attach_foreign(base, foreign, name)
    adapter.config = {
        "provenance": {
            "imported": {"format": foreign.format, "source": str(source), "made for": foreign.made_for, "unverified": True,
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
        raise error(f"the {foreign.format} file does not fit {foreign.method.name} on {base.id}:\n  - " + "\n  - ".join(wrong))
    adapter.put(foreign.tensors)
    adapter.train(False)
    return base._attach(adapter)

"""What a file of another library becomes here, and reading such files without trusting them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from onebase.errors import CorruptError, MismatchError, OnebaseError, UnsupportedError
from onebase.methods.method import Method
from onebase.store.disk import read_regular
from onebase.store.schema import read_json
from onebase.store.tensors import decode
from onebase.store.verify import CONFIG_BYTES, PICKLES

if TYPE_CHECKING:
    from onebase.base import Base

CONFIG = "adapter_config.json"
LINES, LONG = 40, 400  # of a message: problems that are listed, and characters of each
CONVERT = "python -m onebase.store.interop.pickle"


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """An adapter of another library in the terms of this one.

    Attributes:
        format: 'peft' or 'adapterhub'.
        method: the method with its settings.
        task: fields of the task that the file decides; {} leaves the base's default.
        tensors: named as `Adapter.tensors` names them; float32.
        notes: what a person should know: parts of the file that have no effect there either, exact conversions.
        made_for: the base that the file names, '' where it names none. For people, never compared.
    """

    format: str
    method: Method
    task: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    made_for: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CorruptError: it is missing, no JSON, or no object.
    """
    try:
        raw = read_json(read_regular(path, CONFIG_BYTES))
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error.strerror}. Is this the folder of an adapter?") from error
    except ValueError as error:
        raise CorruptError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(raw, dict):
        raise CorruptError(f"{path} holds a {type(raw).__name__}, expected an object with settings")
    return raw


def most_bytes(base: Base) -> int:
    """Return what the tensors of an adapter may take at most, so that a longer file is not read into memory.

    A change of every weight in float64, and a gibibyte for what small bases leave out of proportion.
    """
    return 8 * sum(p.numel() for p in base.model.parameters()) + 2**30


def read_tensors(folder: Path, name: str, pickled: str, most: int, *, numbers: bool = False) -> dict[str, Tensor]:
    """Read a safetensors file; a pickle in its place is never opened.

    Args:
        folder: of the adapter.
        name: of the safetensors file.
        pickled: name that the same tensors have as a pickle.
        most: bytes that the file may have, see `most_bytes`.
        numbers: tensors of whole numbers, such as places in a matrix, are fine too.

    Raises:
        UnsupportedError: there is only the pickle; the message has the command that converts it.
        CorruptError: the file is missing or damaged, or tensors hold NaN or inf, or whole numbers that nothing reads.
    """
    path = folder / name
    if not path.is_file():
        if (folder / pickled).is_file():
            raise UnsupportedError(
                f"{folder / pickled} is a pickle, which can run code when it is opened: it is not. Convert it in a "
                f"separate, restricted process, and import again:\n  {CONVERT} {folder / pickled} {path}"
            )
        others = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", *PICKLES))
        raise CorruptError(f"{folder} has no {name}" + (f"; it has {', '.join(others)}" if others else ""))
    try:
        tensors = decode(read_regular(path, most))
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CorruptError(f"{path} is {error}") from None
    refuse(f"{path} cannot be used", _unusable(tensors, numbers), CorruptError)
    return tensors


def _unusable(tensors: Mapping[str, Tensor], numbers: bool) -> Iterator[str]:
    for key, t in tensors.items():
        if not t.is_floating_point():
            if not numbers or t.is_complex():
                yield f"{key}: values are {str(t.dtype).removeprefix('torch.')}, expected floating point"
        elif not bool(torch.isfinite(t.float()).all()):
            yield f"{key}: {int((~torch.isfinite(t.float())).sum())} of {t.numel()} values are NaN or infinite"


def _clipped(line: str) -> str:
    """Keep both ends of a line: names in a file can be of any length, and the reason stands at the end."""
    return line if len(line) <= LONG else f"{line[: LONG // 2]} ... {line[-LONG // 2 :]}"


def refuse(what: str, wrong: Iterable[str], error: type[OnebaseError] = MismatchError) -> None:
    """Raise one error that lists everything wrong, if anything is."""
    lines = list(dict.fromkeys(wrong))
    if lines:
        shown = [_clipped(line) for line in lines[:LINES]]
        shown += [f"and {len(lines) - LINES} more"] if len(lines) > LINES else []
        raise error(f"{what}:\n  - " + "\n  - ".join(shown))

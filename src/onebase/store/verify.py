"""Compare an adapter's folder with its own config, and collect everything wrong."""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from onebase.errors import CorruptError
from onebase.store.disk import read_regular, sha256_file
from onebase.store.schema import (
    CONFIG_FILE,
    PICKLES,
    TENSORS_FILE,
    AdapterConfig,
    digest_of,
    parse_config,
    read_json,
    refuse_newer,
)
from onebase.store.signing import SIGNATURE_FILE
from onebase.store.tensors import decode, differences, most_bytes

if TYPE_CHECKING:
    import torch

CONFIG_BYTES = 64 * 2**20  # a config lists tensors, labels and probes: kilobytes


def read_config(folder: Path) -> AdapterConfig:
    """Read and check `adapter_config.json`; the other files are not looked at.

    Args:
        folder: an adapter's folder.

    Returns:
        The config.

    Raises:
        CorruptError: the file is missing, no JSON, or has wrong fields.
        StoreError: a newer onebase wrote it.
    """
    path = folder / CONFIG_FILE
    try:
        raw = read_json(read_regular(path, CONFIG_BYTES))
    except OSError as error:
        raise CorruptError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise CorruptError(f"{path} is not valid JSON: {error}.") from None
    return parse_config(raw, str(path))


def inspect(folder: Path, known: AdapterConfig) -> tuple[list[str], dict[str, torch.Tensor]]:
    """Compare every file and tensor of a folder with the config.

    Args:
        folder: an adapter's folder.
        known: the config as it was when the adapter was resolved; judges the rest where the file is broken.

    Returns:
        Everything wrong, one message each; and the tensors, to be trusted only if nothing is.
        They come from the very bytes that were hashed, so nothing can change in between.

    Raises:
        StoreError: a newer onebase wrote the config.
    """
    if not folder.is_dir():
        return [f"the folder {folder} does not exist"], {}
    config, problems = _config(folder, known)
    problems += _extra_files(folder, config)
    tensors: dict[str, torch.Tensor] = {}
    for name in sorted({*config.files, TENSORS_FILE}):
        if name == TENSORS_FILE:
            tensors, more = _tensors(folder / name, config)
            problems += more
        else:
            problems += _file(folder / name, config.files[name])
    return problems, tensors


def _config(folder: Path, known: AdapterConfig) -> tuple[AdapterConfig, list[str]]:
    path = folder / CONFIG_FILE
    if not path.is_file() and not path.is_symlink():
        return known, [f"missing file {CONFIG_FILE}"]
    try:
        raw = read_json(read_regular(path, CONFIG_BYTES))
        refuse_newer(raw, str(path))
        config = parse_config(raw, CONFIG_FILE)
    except CorruptError as error:
        return known, [str(error)]
    except OSError as error:
        return known, [f"file {CONFIG_FILE}: {error.strerror}"]
    except ValueError as error:
        return known, [f"{CONFIG_FILE} is not valid JSON: {error}"]
    problems = []
    if (actual := digest_of(raw)) != config.digest:
        problems.append(f"{CONFIG_FILE} has digest {actual}, but says {config.digest}: it was edited")
    elif config.digest != known.digest:
        problems.append(f"{CONFIG_FILE} is another adapter's: it has digest {actual}, resolved was {known.digest}")
    return config, problems


def _extra_files(folder: Path, config: AdapterConfig) -> Iterator[str]:
    for entry in sorted(folder.iterdir()):
        if entry.name in (CONFIG_FILE, TENSORS_FILE, SIGNATURE_FILE) or entry.name in config.files:
            continue
        kind = "folder" if entry.is_dir() else "file"
        note = " (looks like a pickle; it is never opened)" if entry.suffix.lower() in PICKLES else ""
        yield f"unexpected {kind} {entry.name}{note}"


def _file(path: Path, expected: str) -> Iterator[str]:
    try:
        actual = sha256_file(path)
    except OSError as error:
        yield f"missing file {path.name}" if not os.path.lexists(path) else f"file {path.name}: {error.strerror}"
        return
    yield from _mismatch(path.name, actual, expected)


def _mismatch(name: str, actual: str, expected: str | None) -> Iterator[str]:
    if expected is None:
        yield f"{CONFIG_FILE} lists no sha256 for {name}"
    elif actual != expected:
        yield f"file {name} has sha256 {actual}, the config says {expected}"


def _tensors(path: Path, config: AdapterConfig) -> tuple[dict[str, torch.Tensor], list[str]]:
    try:
        data = read_regular(path, most_bytes(config.tensors))
    except OSError as error:
        reason = f"missing file {path.name}" if not os.path.lexists(path) else f"file {path.name}: {error.strerror}"
        return {}, [reason, *(f"missing tensor {name!r}" for name in sorted(config.tensors))]
    problems = [*_mismatch(path.name, sha256(data).hexdigest(), config.files.get(path.name))]
    try:
        tensors = decode(data)
    except ValueError as error:
        return {}, [*problems, f"file {path.name} is {error}"]
    return tensors, [*problems, *differences(tensors, config.tensors)]

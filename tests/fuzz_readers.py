"""Bytes that a fuzzer finds by coverage, given to everything that reads files of others.

    pip install atheris
    python tests/fuzz_readers.py -max_total_time=600

The first byte says who reads the rest. A reader may return, or raise the error that it documents; everything else is a
finding, and the fuzzer writes the bytes to a file.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["onebase"]):
    from onebase.core import patterns
    from onebase.data import load
    from onebase.errors import OnebaseError
    from onebase.methods import parse_method
    from onebase.store import names
    from onebase.store.interop import peft_config
    from onebase.store.schema import parse_config, read_json
    from onebase.store.tensors import decode

FOLDER = Path(tempfile.mkdtemp())
ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".txt", ".conll")


def tensors(data: bytes) -> None:
    """A safetensors file."""
    try:
        found = decode(data)
    except ValueError:
        return
    assert all(tensor.numel() * tensor.element_size() <= len(data) for tensor in found.values())


def config(data: bytes) -> None:
    """The config of a stored adapter."""
    try:
        raw = read_json(data)
    except ValueError:
        return
    try:
        parse_config(raw, "here")
    except OnebaseError:
        return


def foreign(data: bytes) -> None:
    """The config of a PEFT adapter."""
    try:
        raw = read_json(data)
    except ValueError:
        return
    if isinstance(raw, dict):
        list(peft_config.config_problems(raw))
        list(peft_config.kind_problems(raw))


def method(data: bytes) -> None:
    """A method's shorthand."""
    try:
        parse_method(data.decode("utf-8", "replace"))
    except OnebaseError:
        return


def name(data: bytes) -> None:
    """A reference to an adapter."""
    try:
        names.split_ref(data.decode("utf-8", "replace"))
    except OnebaseError:
        return


def pattern(data: bytes) -> None:
    """A regular expression of a file, on the name of a module."""
    try:
        patterns.safe_pattern(data.decode("utf-8", "replace")).fullmatch("encoder.layer.0.attention.self.query")
    except OnebaseError:
        return


def rows(data: bytes) -> None:
    """A data file of some format."""
    path = FOLDER / f"rows{ENDINGS[data[0] % len(ENDINGS) if data else 0]}"
    path.write_bytes(data[1:])
    try:
        load(path)
    except OnebaseError:
        return


READERS = (tensors, config, foreign, method, name, pattern, rows)


def read(data: bytes) -> None:
    """Give the bytes to a reader."""
    if data:
        READERS[data[0] % len(READERS)](data[1:])


if __name__ == "__main__":
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()

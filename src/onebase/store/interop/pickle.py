"""Convert a pickled adapter to safetensors, in a process of its own that unpickles tensors only.

    python -m onebase.store.interop.pickle pytorch_adapter.bin adapter.safetensors

Reading adapters never opens a pickle. This command does, with torch's restricted unpickler (``weights_only=True``: no
code of the file runs), because people may ask for it by name.
"""

from __future__ import annotations

import sys
from pathlib import Path


def convert(source: Path, target: Path) -> int:
    """Convert one file.

    Args:
        source: a pickle that holds a mapping of names to tensors.
        target: the safetensors file to write; must not exist.

    Returns:
        The number of tensors.

    Raises:
        CorruptError: the pickle holds something else, or would run code.
        StoreError, ConfigError: tensors that cannot be stored.
    """
    import pickle

    import torch

    from onebase.errors import CorruptError
    from onebase.store.disk import write_file
    from onebase.store.tensors import encode

    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        first = str(error).strip().splitlines()[0]
        raise CorruptError(f"{source} was not converted: {first}") from error
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise CorruptError(f"{source} was not converted: it holds more than named tensors")
    data, _ = encode(found)
    write_file(target, data)
    return len(found)


def main(words: list[str]) -> int:
    """Run the command; return the exit code."""
    from onebase.errors import OnebaseError

    if len(words) != 2:
        print("usage: python -m onebase.store.interop.pickle IN.bin OUT.safetensors", file=sys.stderr)
        return 2
    try:
        count = convert(Path(words[0]), Path(words[1]))
    except (OnebaseError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{words[1]}: {count} tensors")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Reading a --config file: YAML, JSON or TOML, where a repeated key is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from onebase.cli.failures import UsageError


def read_config(path: Path) -> dict[str, Any]:
    """Read a config file.

    Args:
        path: .yaml, .yml, .json or .toml.

    Returns:
        Its keys and values.

    Raises:
        UsageError: no such file, another extension, malformed, or no mapping.
    """
    readers: dict[str, Callable[[str], Any]] = {
        ".yaml": _read_yaml,
        ".yml": _read_yaml,
        ".json": _read_json,
        ".toml": _read_toml,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"--config {path}: expected one of {', '.join(readers)}")
    if not path.is_file():
        raise UsageError(f"--config: no file {str(path)!r}")
    try:
        found = reader(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path.name} cannot be read: {error}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UsageError(f"{path.name} holds a {type(found).__name__}; expected keys and values such as lr: 0.0005")
    return found


def _read_json(text: str) -> Any:
    from onebase.store.schema import read_json

    return read_json(text.encode())


def _read_toml(text: str) -> Any:
    import tomllib

    return tomllib.loads(text)


def _read_yaml(text: str) -> Any:
    import yaml

    class Strict(yaml.SafeLoader):
        """YAML's safe loader, which would let the last of two equal keys win."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if keys.count(key) > 1:
                    raise ValueError(f"key {key!r} is given twice")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Strict)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error

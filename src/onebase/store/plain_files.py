"""Plain files that people write: YAML, JSON or TOML, where a repeated key is an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from onebase.errors import ConfigError


def read_plain(path: Path, option: str) -> Any:
    """Read a file.

    Args:
        path: .yaml, .yml, .json or .toml.
        option: what named the file, for messages.

    Returns:
        What it holds; None where it is empty.

    Raises:
        ConfigError: no such file, another extension, or malformed.
    """
    readers: dict[str, Callable[[str], Any]] = {
        ".yaml": _read_yaml,
        ".yml": _read_yaml,
        ".json": _read_json,
        ".toml": _read_toml,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ConfigError(f"{option} {path}: expected one of {', '.join(readers)}")
    if not path.is_file():
        raise ConfigError(f"{option}: no file {str(path)!r}")
    try:
        return reader(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path.name} cannot be read: {error}") from error


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

"""Reading a --config file: YAML, JSON or TOML, where a repeated key is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onebase.cli.failures import UsageError
from onebase.errors import ConfigError


def read_config(path: Path) -> dict[str, Any]:
    """Read a config file.

    Args:
        path: .yaml, .yml, .json or .toml.

    Returns:
        Its keys and values.

    Raises:
        UsageError: no such file, another extension, malformed, or no mapping.
    """
    from onebase.store.plain_files import read_plain

    try:
        found = read_plain(path, "--config")
    except ConfigError as error:
        raise UsageError(str(error)) from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise UsageError(f"{path.name} holds a {type(found).__name__}; expected keys and values such as lr: 0.0005")
    return found

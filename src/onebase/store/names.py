"""What an adapter may be called, and how a reference such as ``reviews@3`` is read."""

from __future__ import annotations

import os
import re
from pathlib import Path

from onebase.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_LENGTH = 64
PLAIN = "base"  # what routes and a server's requests call the base without any adapter
VERSION = re.compile(r"[1-9][0-9]{0,8}")  # no leading zero: one spelling, one folder
# learn.microsoft.com "Naming Files, Paths, and Namespaces": reserved alone and before any extension
WINDOWS_RESERVED = {"con", "prn", "aux", "nul"} | {f"{d}{n}" for d in ("com", "lpt") for n in range(10)}


def check_name(name: object) -> str:
    """Check that `name` can be the name of an adapter on every file system.

    Args:
        name: the name wanted.

    Returns:
        The same name.

    Raises:
        ConfigError: it is not a string, has other characters, or means something to a file system.
    """
    rule = "1 to 64 of letters, digits, '.', '_' and '-', beginning with a letter or digit, e.g. 'reviews-v2'"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(f"adapter name {name!r} cannot be used; expected {rule}.")
    if ".." in name or name.endswith("."):
        raise ConfigError(f"adapter name {name!r} has '..' or ends in '.', which paths give a meaning of its own.")
    if name.split(".")[0].lower() in WINDOWS_RESERVED:
        raise ConfigError(f"adapter name {name!r} is reserved by Windows; choose another, e.g. 'my-{name}'.")
    return name


def check_new_name(name: object) -> str:
    """Check that an adapter can be stored under `name`, and be asked for by it afterwards.

    Raises:
        ConfigError: see `check_name`, or the name means the plain base.
    """
    name = check_name(name)
    if name == PLAIN:
        raise ConfigError(f"adapter name {name!r} means the plain base; choose another, e.g. 'my-{name}'.")
    return name


def is_path(ref: str | os.PathLike[str]) -> bool:
    """Tell whether `ref` means a folder: a path object, an absolute path, or text with a separator."""
    return not isinstance(ref, str) or "/" in ref or "\\" in ref or os.path.isabs(ref)


def split_ref(ref: str) -> tuple[str, str | None]:
    """Split ``"reviews@3"`` into its name and version, and ``"reviews"`` into its name and None.

    Args:
        ref: a reference, not a path.

    Returns:
        The name, checked, and the text after ``@``, not checked.

    Raises:
        ConfigError: the name cannot be a name, or the version is empty.
    """
    name, at, version = ref.partition("@")
    if at and not version:
        raise ConfigError(f"reference {ref!r} ends in '@'; write {name!r} for the newest version, or '{name}@1'.")
    return check_name(name), version if at else None


def name_of_path(data: str | Path) -> str:
    """Make a valid adapter name of a data path: ``My reviews.csv`` gives ``My-reviews``."""
    path = Path(data).expanduser().resolve()
    return clean_name(path.name if path.is_dir() else path.stem)


def clean_name(text: str) -> str:
    """Make a valid adapter name of any text."""
    name = re.sub(r"[^A-Za-z0-9._-]+|\.\.+", "-", text).lstrip("._-").rstrip(".-")[:NAME_LENGTH].rstrip(".-")
    name = name or "adapter"
    taken = name == PLAIN or name.split(".")[0].lower() in WINDOWS_RESERVED
    return f"my-{name}"[:NAME_LENGTH] if taken else name

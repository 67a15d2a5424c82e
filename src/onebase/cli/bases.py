"""Loading a base for a command, and the stored adapters that a command asks for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from onebase.cli.failures import UsageError
from onebase.cli.options import BASE_VARIABLE, default_base
from onebase.errors import ConfigError
from onebase.store.names import PLAIN

if TYPE_CHECKING:
    from onebase.base import Base
    from onebase.cli.output import Output
    from onebase.store import Stored


def check_kinds(refs: Sequence[str], writes: bool) -> None:
    """Refuse adapters of the wrong kind before a base is loaded.

    Args:
        refs: references.
        writes: whether the command wants adapters that write text.

    Raises:
        UsageError: names the command that fits.
    """
    from onebase.store import Store
    from onebase.tasks import get_task

    for ref in refs:
        kind = None if ref == PLAIN else Store().resolve(ref).config.task.get("kind")
        if kind is not None and get_task(kind).writes != writes:
            does, command = ("labels texts", "predict") if writes else ("writes text", "generate")
            raise UsageError(f"adapter {ref!r} {does} ({kind}): use onebase {command} -a {ref}")


def quiet() -> None:
    """Silence transformers' own progress bars and notes."""
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def open_base(name: str, device: str | None, dtype: str | None, out: Output, quantize: str | None = None) -> Base:
    """Load a base and say so."""
    from onebase.loading import load_base

    quiet()
    out.note(f"loading base {name}" + (f" in {quantize}" if quantize else ""))
    return load_base(name, device=device, dtype=dtype, quantize=quantize)


def open_adapters(
    refs: Sequence[str], base_name: str | None, device: str | None, dtype: str | None, out: Output
) -> tuple[Base, dict[str, str | None]]:
    """Load the one base that some stored adapters share, and the adapters onto it.

    Args:
        refs: references; ``base`` is the plain base.
        base_name: the base; None takes what the adapters name.
        device, dtype: of the base.
        out: receives notes.

    Returns:
        The base, and reference -> name to route by (None for the plain base).

    Raises:
        UsageError: the adapters were made for different bases.
    """
    from onebase.store import Store

    store = Store()
    stored = {ref: store.resolve(ref) for ref in refs if ref != PLAIN}
    base = open_shared(list(stored.values()), base_name, device, dtype, out)
    routes: dict[str, str | None] = {}
    for ref in refs:
        routes[ref] = None if ref == PLAIN else base.load(ref, name=ref, store=store).name
    return base, routes


def open_shared(
    stored: list[Stored], base_name: str | None, device: str | None, dtype: str | None, out: Output
) -> Base:
    """Load the one base that stored adapters were made for; see `open_adapters`."""
    if not stored:
        return open_base(base_name or default_base(), device, dtype, out)
    made_for: dict[str, list[Stored]] = {}
    for adapter in stored:
        made_for.setdefault(adapter.config.base.fingerprint, []).append(adapter)
    if len(made_for) > 1:
        shown = "; ".join(
            f"{', '.join(a.ref for a in group)} on {group[0].config.base.id}" for group in made_for.values()
        )
        raise UsageError(f"adapters of one call share one base, but these do not: {shown}. Make one call for each.")
    wanted = stored[0].config.base.id
    quantize = stored[0].config.provenance.get("quantization")  # the base is loaded as the adapter was trained on it
    try:
        return open_base(base_name or name_of_base(stored[0]), device, dtype, out, quantize)
    except ConfigError as error:
        if base_name is not None:
            raise
        raise ConfigError(
            f"{stored[0].ref} was trained on the base {wanted!r}, which cannot be loaded under this name: {error} "
            f"If it is a local folder, pass it: -b /path/to/{Path(wanted).name}"
        ) from error


def name_of_base(stored: Stored) -> str:
    """Return what loads the base of a stored adapter: its folder on this machine, as far as known, or its id."""
    from onebase.store import Store, base_folder

    wanted = stored.config.base.id
    known = base_folder(Store().root, stored.config.base.fingerprint)
    return (str(known) if known else _same_folder(wanted)) or wanted


def _same_folder(wanted: str) -> str | None:
    """Return $ONEBASE_BASE where it is the folder that the adapter's base was loaded from, going by its name."""
    folder = os.environ.get(BASE_VARIABLE)
    return folder if folder and Path(folder).is_dir() and Path(folder).resolve().name == wanted else None

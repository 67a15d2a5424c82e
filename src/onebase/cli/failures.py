"""What goes wrong, as one message for people, one JSON object for programs, and an exit code."""

from __future__ import annotations

import json
import os
import sys
import traceback

import typer

from onebase.errors import ConfigError, OnebaseError, UnknownNameError, unknown

FAILED, USAGE, INTERRUPTED = 1, 2, 130
# Typer has its own copy of click in some versions and imports click in others; its classes are reached through one
# that it always exports.
_UsageError = typer.BadParameter.__bases__[0]
_ClickError = _UsageError.__bases__[0]


class UsageError(ConfigError):
    """The command line asks for something that has no meaning."""


def misspelt(kind: str, name: str, choices: object) -> UsageError:
    """Build the error for a name on the command line or in a config file that does not exist."""
    return UsageError(str(unknown(kind, name, choices)))  # type: ignore[arg-type]


def report_failure(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Print a failure.

    Args:
        error: what was raised.
        as_json: also print ``{"error": {...}}`` on stdout.
        debug: print the traceback.

    Returns:
        The exit code.
    """
    if isinstance(error, BrokenPipeError):
        return _reader_left()
    if debug and not isinstance(error, KeyboardInterrupt):
        traceback.print_exception(error, file=sys.stderr)
    code, message = _explain(error)
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": {"type": type(error).__name__, "message": message, "exit_code": code}}))
    return code


def _explain(error: BaseException) -> tuple[int, str]:
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted; nothing more was done"
    if isinstance(error, typer.Abort):
        was_key = isinstance(error.__cause__ or error.__context__, KeyboardInterrupt)
        return (INTERRUPTED if was_key else FAILED), "aborted; nothing was done"
    if isinstance(error, _ClickError):
        return _explain_click(error)
    if isinstance(error, ConfigError):
        return USAGE, str(error)
    if isinstance(error, OnebaseError):
        return FAILED, _with_next_step(error)
    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        return FAILED, f"{place}{error.strerror or error}"
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return FAILED, f"unexpected {type(error).__name__}: {first} (run with --debug for the traceback)"


def _explain_click(error: BaseException) -> tuple[int, str]:
    message = error.format_message()  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    if context is not None:
        message += f"\nSee: {context.command_path} --help"
    return int(getattr(error, "exit_code", USAGE)), message


def _with_next_step(error: OnebaseError) -> str:
    if isinstance(error, UnknownNameError) and str(error).startswith("unknown adapter"):
        return f"{error} See: onebase ls"
    return str(error)


def _reader_left() -> int:
    """Keep Python quiet at exit when the reader of a pipe has gone (``onebase ls | head -1``)."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    return FAILED

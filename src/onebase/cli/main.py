"""The program `onebase`: its commands, and one place where every failure becomes a message and an exit code."""

from __future__ import annotations

import io
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from onebase import __version__
from onebase.cli import (
    anatomy,
    chat,
    check,
    compare,
    compose,
    demo,
    doctor,
    evaluate,
    exchange,
    generate,
    hub,
    methods,
    plan,
    predict,
    report,
    serve,
    shelf,
    sign,
    train,
    versions,
)
from onebase.cli.failures import UsageError, report_failure

EPILOG = "Exit codes: 0 done, 1 failed, 2 the command line or a setting is wrong, 130 interrupted."


class Program(TyperGroup):
    """The group of commands; turns exceptions into messages and exit codes."""

    def main(self, args: Any = None, prog_name: str | None = None, **extra: Any) -> Any:
        """Run the program and exit."""
        words = list(sys.argv[1:] if args is None else args)
        flags = set(words[: words.index("--")] if "--" in words else words)
        _print_anything()
        try:
            extra["standalone_mode"] = False
            code = super().main(args=words, prog_name=prog_name or "onebase", **extra)
            if code == 130:  # typer's own answer to an interrupt
                raise KeyboardInterrupt
            sys.stdout.flush()
        except (Exception, KeyboardInterrupt) as error:
            code = report_failure(error, as_json="--json" in flags, debug="--debug" in flags)
        sys.exit(code if isinstance(code, int) else 0)


class Command(TyperCommand):
    """One command; refuses a repeat of an option that has one value, of which the last would win in silence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a command line."""
        if not ctx.resilient_parsing:  # completion reads lines that are not finished
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            seen: set[str] = set()
            for found in order:
                if getattr(found, "multiple", True) or getattr(found, "is_flag", True):
                    continue  # an argument, a switch, or an option that may be repeated
                if found.name in seen:
                    raise UsageError(f"{found.opts[0]} is given twice; expected one value. Leave one out.")
                seen.add(found.name)
        return super().parse_args(ctx, args)


def _print_anything() -> None:
    """Never fail on a character that the terminal's encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


app = typer.Typer(
    cls=Program,
    epilog=EPILOG,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {
    "check": check.check,
    "compare": compare.compare,
    "train": train.train,
    "predict": predict.predict,
    "eval": evaluate.evaluate,
    "generate": generate.generate,
    "chat": chat.chat,
    "plan": plan.plan,
    "report": report.report,
    "serve": serve.serve,
    "ls": shelf.ls,
    "show": shelf.show,
    "rm": shelf.rm,
    "import": exchange.import_,
    "export": exchange.export,
    "merge": exchange.merge,
    "compose": compose.compose,
    "keygen": sign.keygen,
    "sign": sign.sign,
    "push": hub.push,
    "pull": hub.pull,
    "promote": versions.promote,
    "rollback": versions.rollback,
    "diff": versions.diff,
    "gc": versions.gc,
    "methods": methods.methods,
    "anatomy": anatomy.anatomy,
    "doctor": doctor.doctor,
    "demo": demo.demo,
}
for _name, _function in COMMANDS.items():
    app.command(_name, cls=Command)(_function)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"onebase {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Many small adapters, of any method, over one frozen base model: train, store, mix, compare."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the program with the arguments of this process."""
    app()

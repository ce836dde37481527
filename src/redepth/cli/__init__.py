"""The command line: one file a command; what `import redepth` does not load is imported inside the command."""

import contextlib
import os
import sys
import tempfile
import traceback
from importlib.metadata import version
from typing import Any

import typer

from redepth.cli import (
    analyze,
    calibrate,
    chat,
    convert,
    eval,
    generate,
    heal,
    inspect,
    new,
    plan,
    play,
    publish,
    quantize,
    retrofit,
    serve,
    verify,
)
from redepth.errors import RedepthError, is_mistake

INTERRUPTED = 130
# What typer raises for wrong words on the command line; it gives the class no public name.
CommandLineError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="redepth",
    help="Convert, verify, heal and run depth-recurrent language models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for module in (
    plan,
    convert,
    verify,
    inspect,
    heal,
    calibrate,
    quantize,
    eval,
    analyze,
    retrofit,
    publish,
    generate,
    chat,
    play,
    serve,
    new,
):
    app.command(module.__name__.rpartition(".")[2])(module.command)


def main() -> None:
    """Entry point: a user's mistake or a broken input ends in one line and exit code 2, a bug of redepth's in 1.

    REDEPTH_DEBUG=1 shows the whole traceback instead.
    """
    try:
        code = app(args=sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except Exception as error:
        if os.environ.get("REDEPTH_DEBUG"):
            raise
        line, code = told(error)
        if line:
            print(f"redepth: {line}", file=sys.stderr)
    except KeyboardInterrupt:
        code = INTERRUPTED
    sys.exit(code if isinstance(code, int) else 0)


def told(error: Exception) -> tuple[str, int]:
    """An exception as a line for standard error, empty where there is nothing to say, and the exit code."""
    if isinstance(error, BrokenPipeError):
        # Whoever read our output has left; what is still held back goes nowhere.
        with contextlib.suppress(OSError):  # of a standard output that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "", 1
    if isinstance(error, typer.Abort):
        return "", INTERRUPTED
    if isinstance(error, CommandLineError):
        return f"{' '.join(error.format_message().split()).rstrip('.')}; see --help", error.exit_code
    line = " ".join(str(error).split())
    if is_mistake(error):
        return line or type(error).__name__, getattr(error, "exit_code", RedepthError.exit_code)
    try:
        with tempfile.NamedTemporaryFile("w", prefix="redepth-bug-", suffix=".txt", delete=False) as file:
            file.write(f"redepth {version('redepth')}: {' '.join(sys.argv[1:])}\n")
            traceback.print_exception(error, file=file)
        where = f"please report it with {file.name}, which holds the traceback"
    except OSError:
        where = "run again with REDEPTH_DEBUG=1 for the traceback, and please report it"
    return f"this is a bug of redepth, {type(error).__name__}: {line[:200]}; {where}", 1

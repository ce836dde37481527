"""The command line: one file a command, imported when the command is named; what is heavy is imported inside it."""

import ast
import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import typer

from redepth.errors import RedepthError, is_mistake

# Each is the name of its file, in the order of `redepth --help`.
COMMANDS = (
    "plan",
    "convert",
    "verify",
    "inspect",
    "heal",
    "calibrate",
    "quantize",
    "eval",
    "analyze",
    "retrofit",
    "publish",
    "generate",
    "chat",
    "play",
    "serve",
    "new",
)
INTERRUPTED = 130
# What typer raises for wrong words on the command line; it gives the class no public name.
CommandLineError: Any = typer.BadParameter.__base__


def _app(imported: Sequence[str]) -> typer.Typer:
    """All commands; of those that are not imported, what `redepth --help` says of them."""
    made = typer.Typer(
        name="redepth",
        help="Convert, verify, heal and run depth-recurrent language models.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    for name in COMMANDS:
        made.command(name)(import_module(f"{__name__}.{name}").command if name in imported else _described(name))
    return made


def _described(name: str) -> Callable[[], None]:
    """Stands in for a command that is only listed: its words, read from its file."""

    def command() -> None:
        raise AssertionError(f"{name} was called without having been imported")

    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    functions = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "command")
    command.__doc__ = ast.get_docstring(next(functions))
    return command


@cache
def _whole_app() -> typer.Typer:
    return _app(COMMANDS)


def __getattr__(name: str) -> Any:
    """`app`, every command with its arguments and flags, for whoever asks for it; a call imports the one that it names."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _whole_app()


def __dir__() -> list[str]:
    return sorted({*globals(), "app"})


def main() -> None:
    """Entry point: a user's mistake or a broken input ends in one line and exit code 2, a bug of redepth's in 1.

    REDEPTH_DEBUG=1 shows the whole traceback instead.
    """
    try:
        words = sys.argv[1:] or ["--help"]
        named = next((word for word in words if not word.startswith("-")), "")
        code = _app([named])(args=words, standalone_mode=False)
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

"""The command line: one file a command; what `import redepth` does not load is imported inside the command."""

import os
import sys

import typer
from safetensors import SafetensorError

from redepth.cli import analyze, calibrate, chat, convert, generate, heal, inspect, new, plan, retrofit, verify
from redepth.errors import RedepthError

app = typer.Typer(
    name="redepth",
    help="Convert, verify, heal and run depth-recurrent language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for module in (plan, convert, verify, inspect, heal, calibrate, analyze, retrofit, generate, chat, new):
    app.command(module.__name__.rpartition(".")[2])(module.command)


def main() -> None:
    """Entry point: a user's mistake or a broken input ends in one line and exit code 2.

    REDEPTH_DEBUG=1 shows the whole traceback instead.
    """
    try:
        app()
    except (RedepthError, ValueError, OSError, SafetensorError) as error:
        if os.environ.get("REDEPTH_DEBUG"):
            raise
        line = " ".join(str(error).split())
        print(f"redepth: {line or type(error).__name__}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))

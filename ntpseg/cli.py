"""The ``ntpseg`` program: assembles the commands, each of which lives in `ntpseg.commands`."""

from __future__ import annotations

import importlib
import sys

import typer

app = typer.Typer(
    name="ntpseg",
    help="Medical referring image segmentation by next-token prediction.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Each module defines `register(app)`; heavy imports happen inside its command functions.
COMMANDS = ("env", "data", "tokenizer", "train", "evaluate", "predict", "report", "pack", "bench", "reproduce")

for _name in COMMANDS:
    importlib.import_module(f"ntpseg.commands.{_name}").register(app)


def main() -> None:
    """Run the program; a `ValueError` about the user's input or a file that fails ends in one line and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        typer.secho(f"ntpseg: {_described(error)}", fg="red", err=True)
        sys.exit(2)


def _described(error: Exception) -> str:
    """What an error says; the operating system's own also says what to do."""
    if not isinstance(error, OSError) or error.errno is None or error.filename is None:
        return str(error)
    from ntpseg.utils.outputs import cure

    return f"{error.filename}: {error.strerror}; {cure(error)}"


if __name__ == "__main__":
    main()

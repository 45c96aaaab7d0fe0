"""`gradfold COMMAND ...`: finds the command, runs it, and turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 after an error the user can act on, or 130 after Ctrl-C.

    With GRADFOLD_DEBUG=1 an error's traceback is shown too.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return OK if words else ERROR
    if words[0] == "--version":
        print(f"gradfold {_version()}")
        return OK
    name = words[0]
    if name not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there is {', '.join(COMMANDS)}"
        return _fail(f"unknown command {name!r}{hint}")
    try:
        return importlib.import_module(COMMANDS[name][0]).run(words[1:])
    except KeyboardInterrupt:
        _debug()
        return _fail("interrupted", INTERRUPTED)
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
        return _fail(message, getattr(error, "exit_code", ERROR))


def _message(error: Exception) -> str | None:
    """One line for errors that a user can act on; None for the ones that are bugs of ours."""
    from gradfold.train.errors import one_line

    # A class whose instance was raised has been loaded, so this loads nothing.
    ours = tuple(getattr(sys.modules[module], name) for module, name in ERRORS.items() if module in sys.modules)
    if isinstance(error, ours):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{f' ({error.filename})' if error.filename else ''}; free some space"
    if isinstance(error, PermissionError):
        return f"{error.filename or 'a file'}: no permission; name a folder of your own"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return (
            f"out of memory ({one_line(error)}); lower batch_size (gradient.accumulate makes up for it) "
            "or sequence_length, or use --gradient-checkpointing"
        )
    return None


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("gradfold")
    except PackageNotFoundError:  # run from a folder of sources
        import gradfold

        return gradfold.__version__


def _fail(message: str, code: int = ERROR) -> int:
    print(f"gradfold: {message}", file=sys.stderr)
    return code


def _debug() -> None:
    if os.environ.get("GRADFOLD_DEBUG") == "1":
        traceback.print_exc()


def _usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items())
    return f"usage: gradfold COMMAND ...\n\n{commands}\n\n`gradfold COMMAND --help` says more; --version"


if __name__ == "__main__":
    sys.exit(main())

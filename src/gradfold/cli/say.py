"""One line on standard error, whatever it repeats of files and words that strangers wrote."""

from __future__ import annotations

import sys

MOST_LETTERS = 1000
"""Length of the line that says what is wrong."""


def one_line(message: object) -> str:
    """Without line breaks and control characters, and shortened in its middle where it repeats something endless."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(message).split()))
    half = MOST_LETTERS // 2
    return line if len(line) <= MOST_LETTERS else f"{line[:half]} ... {line[-half:]}"


def complain(message: object) -> None:
    """Print `gradfold: ` and one line to standard error."""
    if sys.stderr is not None:  # print() would take standard output instead
        print(f"gradfold: {one_line(message)}", file=sys.stderr)

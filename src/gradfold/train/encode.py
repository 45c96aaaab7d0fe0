"""Old name of `gradfold.train.tokens`; goes with the next release."""

from __future__ import annotations

import warnings

from .tokens import ROWS_AT_ONCE, Encoded, Tokens, encode_prompt, encode_rows

__all__ = ["ROWS_AT_ONCE", "Encoded", "Tokens", "encode_prompt", "encode_rows"]

warnings.warn(
    "gradfold.train.encode is now gradfold.train.tokens; the old name goes with the next release",
    DeprecationWarning,
    stacklevel=2,
)

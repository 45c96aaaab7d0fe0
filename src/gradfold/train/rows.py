"""Old name of `gradfold.train.readers`; goes with the next release."""

from __future__ import annotations

import warnings

from .readers import SUFFIXES, read_rows
from .shapes import FIELDS, DataRow, Shape

Row = DataRow

__all__ = ["FIELDS", "SUFFIXES", "Row", "Shape", "read_rows"]

warnings.warn(
    "gradfold.train.rows is now gradfold.train.readers, and its Row is DataRow; the old names go with the next release",
    DeprecationWarning,
    stacklevel=2,
)

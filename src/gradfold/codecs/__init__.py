"""Codecs: how weights and optimizer states are stored, and the random bits that round them."""

from .base import BLOCK, Codec, Matrix, Part, Parts, matrix
from .formats import FORMAT, written_by
from .plain import Plain
from .registry import MASTERS, STATES, WEIGHTS, state_codec, weight_codec
from .rounding import WEIGHT, Stream, random_bits, random_words, round_stochastic, row_offsets, stream_key
from .split import Split, dither, export_master, import_master

__all__ = [
    "BLOCK",
    "FORMAT",
    "MASTERS",
    "STATES",
    "WEIGHT",
    "WEIGHTS",
    "Codec",
    "Matrix",
    "Part",
    "Parts",
    "Plain",
    "Split",
    "Stream",
    "dither",
    "export_master",
    "import_master",
    "matrix",
    "random_bits",
    "random_words",
    "round_stochastic",
    "row_offsets",
    "state_codec",
    "stream_key",
    "weight_codec",
    "written_by",
]

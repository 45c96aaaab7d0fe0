"""Training on many ranks, on torch's own DTensor, FSDP2, pipelines and process groups."""

from .ranks import ALONE, Ranks, ranks_of
from .spread import spread

__all__ = ["ALONE", "Ranks", "ranks_of", "spread"]

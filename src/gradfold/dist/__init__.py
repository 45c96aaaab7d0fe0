"""Training on many ranks, on torch's own DTensor, FSDP2, pipelines and process groups."""

from .ranks import ALONE, Ranks, ranks_of
from .stages import Stages

__all__ = ["ALONE", "Ranks", "Stages", "ranks_of"]

"""Training on many ranks, on torch's own DTensor, FSDP2, pipelines and process groups."""

from .fsdp import Sharding, sharding_of
from .ranks import ALONE, Ranks, ranks_of
from .spread import spread
from .stages import Stages

__all__ = ["ALONE", "Ranks", "Sharding", "Stages", "ranks_of", "sharding_of", "spread"]

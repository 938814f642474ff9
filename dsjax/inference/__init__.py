"""Texts from a trained model: `load` a run or a published checkpoint, and ask the engine."""

from dsjax.inference.engine import Engine, Result
from dsjax.inference.loading import load
from dsjax.inference.prefix import PrefixCache
from dsjax.inference.sampling import Sampling

__all__ = ["Engine", "PrefixCache", "Result", "Sampling", "load"]

"""The depth-recurrent model. Its modules travel verbatim inside checkpoints: torch and transformers only."""

from .cache import RecurrentDepthCache
from .configuration import RecurrentDepthConfig
from .model import RecurrentDepthForCausalLM, RecurrentDepthOutput

__all__ = [
    "RecurrentDepthCache",
    "RecurrentDepthConfig",
    "RecurrentDepthForCausalLM",
    "RecurrentDepthOutput",
]

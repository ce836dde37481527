"""The depth-recurrent model. Its modules travel verbatim inside checkpoints: torch and transformers only."""

from .cache import RecurrentDepthCache
from .configuration import RecurrentDepthConfig
from .model import RecurrentDepthForCausalLM, RecurrentDepthOutput
from .policy import DepthPolicy
from .stack import RecurrentStack

__all__ = [
    "DepthPolicy",
    "RecurrentDepthCache",
    "RecurrentDepthConfig",
    "RecurrentDepthForCausalLM",
    "RecurrentDepthOutput",
    "RecurrentStack",
]

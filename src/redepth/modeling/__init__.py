"""The models. The recurrent one's modules travel verbatim inside checkpoints: torch and transformers only."""

from .cache import RecurrentDepthCache
from .configuration import RecurrentDepthConfig
from .model import RecurrentDepthForCausalLM, RecurrentDepthOutput
from .recurrent_gemma import RecurrentGemmaConfig, RecurrentGemmaForCausalLM, RecurrentGemmaModel
from .recurrent_gemma_cache import RecurrentGemmaCache

__all__ = [
    "RecurrentDepthCache",
    "RecurrentDepthConfig",
    "RecurrentDepthForCausalLM",
    "RecurrentDepthOutput",
    "RecurrentGemmaCache",
    "RecurrentGemmaConfig",
    "RecurrentGemmaForCausalLM",
    "RecurrentGemmaModel",
]

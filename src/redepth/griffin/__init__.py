"""RecurrentGemma (Griffin): recurrent in time alone. It has transformers' format, so nothing of it travels."""

from .cache import RecurrentGemmaCache
from .model import RecurrentGemmaConfig, RecurrentGemmaForCausalLM, RecurrentGemmaModel

__all__ = ["RecurrentGemmaCache", "RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", "RecurrentGemmaModel"]

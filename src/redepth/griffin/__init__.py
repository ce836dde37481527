"""RecurrentGemma (Griffin): recurrent in time alone. It has transformers' format, so nothing of it travels."""

from .cache import RecurrentGemmaCache
from .configuration import RecurrentGemmaConfig
from .model import RecurrentGemmaForCausalLM, RecurrentGemmaModel

__all__ = ["RecurrentGemmaCache", "RecurrentGemmaConfig", "RecurrentGemmaForCausalLM", "RecurrentGemmaModel"]

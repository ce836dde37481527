"""redepth: depth-recurrent language models, from surgery to generation.

Importing it registers the published `huginn_raven` format with transformers' Auto classes. For `recurrent_gemma` they go
on giving transformers' own class; `redepth.load` gives redepth's.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .analysis.patch import patch
from .analysis.record import record
from .checkpoint.load import load
from .errors import RedepthError
from .evaluation.calibrate import calibrate
from .griffin import RecurrentGemmaCache, RecurrentGemmaConfig, RecurrentGemmaForCausalLM, RecurrentGemmaModel
from .modeling import RecurrentDepthCache, RecurrentDepthConfig, RecurrentDepthForCausalLM
from .surgery.convert import convert
from .surgery.verify import verify

AutoConfig.register("huginn_raven", RecurrentDepthConfig, exist_ok=True)
AutoModelForCausalLM.register(RecurrentDepthConfig, RecurrentDepthForCausalLM, exist_ok=True)

__all__ = [
    "RecurrentDepthCache",
    "RecurrentDepthConfig",
    "RecurrentDepthForCausalLM",
    "RecurrentGemmaCache",
    "RecurrentGemmaConfig",
    "RecurrentGemmaForCausalLM",
    "RecurrentGemmaModel",
    "RedepthError",
    "calibrate",
    "convert",
    "load",
    "patch",
    "record",
    "verify",
]

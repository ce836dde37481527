"""redepth: depth-recurrent language models, from surgery to generation.

Importing it registers the published `huginn_raven` format with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .errors import RedepthError
from .loading import load
from .modeling import RecurrentDepthCache, RecurrentDepthConfig, RecurrentDepthForCausalLM
from .surgery.convert import convert
from .surgery.verify import verify

AutoConfig.register("huginn_raven", RecurrentDepthConfig, exist_ok=True)
AutoModelForCausalLM.register(RecurrentDepthConfig, RecurrentDepthForCausalLM, exist_ok=True)

__all__ = [
    "RecurrentDepthCache",
    "RecurrentDepthConfig",
    "RecurrentDepthForCausalLM",
    "RedepthError",
    "convert",
    "load",
    "verify",
]

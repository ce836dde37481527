"""redepth: depth-recurrent language models, from surgery to generation."""
from transformers import AutoConfig, AutoModelForCausalLM

from .modeling import RecurrentDepthCache, RecurrentDepthConfig, RecurrentDepthForCausalLM

AutoConfig.register("huginn_raven", RecurrentDepthConfig)
AutoModelForCausalLM.register(RecurrentDepthConfig, RecurrentDepthForCausalLM)

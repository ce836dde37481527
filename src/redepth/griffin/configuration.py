"""RecurrentGemma's configuration: transformers' own, checked."""

from typing import Any

from transformers import RecurrentGemmaConfig as TransformersRecurrentGemmaConfig

from redepth.modeling.errors import UserError

BLOCK_TYPES = ("recurrent", "attention")


class RecurrentGemmaConfig(TransformersRecurrentGemmaConfig):
    """transformers' configuration, refused with a one-line error where no model can have it."""

    def __post_init__(self, **kwargs: Any) -> None:
        check_config(self)
        super().__post_init__(**kwargs)


def check_config(config: Any) -> None:
    """Raise ValueError for a configuration, transformers' own included, that no model can have."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    lru_width = config.lru_width or config.hidden_size
    if config.attention_window_size < 1:
        raise UserError(f"attention_window_size is {config.attention_window_size}, but a window holds at least 1 token")
    if config.conv1d_width < 1:
        raise UserError(f"conv1d_width is {config.conv1d_width}, but a convolution has at least 1 tap")
    if heads < 1 or config.hidden_size % heads:
        raise UserError(f"hidden_size ({config.hidden_size}) is not a multiple of num_attention_heads ({heads})")
    if lru_width % heads:
        raise UserError(f"lru_width ({lru_width}) is not a multiple of num_attention_heads ({heads})")
    if heads % kv_heads:
        raise UserError(f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({kv_heads})")
    unknown = sorted(set(config.block_types) - set(BLOCK_TYPES))
    if unknown or not config.block_types:
        raise UserError(f"block_types holds {unknown or 'nothing'}; use {' and '.join(BLOCK_TYPES)}")


def block_type(config: Any, layer: int) -> str:
    """`recurrent` or `attention`: the pattern repeats over the layers."""
    return config.block_types[layer % len(config.block_types)]

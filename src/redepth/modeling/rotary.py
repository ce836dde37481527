"""Rotary positions (Su et al. 2021): the angles, and the two ways to pair channels.

Shapes: B batch, T tokens, K head_dim.
"""

from collections.abc import Callable

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration import RecurrentDepthConfig


def plain_frequencies(theta: float, rotated: int, device: torch.device) -> torch.Tensor:
    """Radians per token of each pair of the `rotated` channels, `[rotated / 2]` in fp32."""
    channels = torch.arange(0, rotated, 2, device=device, dtype=torch.float32)
    return 1.0 / (theta ** (channels / rotated))


def rotations(
    config: RecurrentDepthConfig, position_ids: torch.Tensor, layer_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotary angles, each `[B, T, half the rotated channels]` in fp32."""
    assert config.rope_parameters is not None and config.head_dim is not None
    nested = layer_type in config.rope_parameters
    parameters = config.rope_parameters[layer_type] if nested else config.rope_parameters
    device, attention_factor = position_ids.device, 1.0
    if parameters["rope_type"] == "default":
        rotated = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        frequencies = plain_frequencies(parameters["rope_theta"], rotated, device)
    else:
        initialise = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        frequencies, attention_factor = initialise(config, device, layer_type=layer_type if nested else None)
    angles = position_ids[..., None].float() * frequencies.float()
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def rotate_half_style(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel i with channel i + half of the rotated ones; the others pass unchanged. `x` is `[B, heads, T, K]`."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(1).to(x.dtype), sin.unsqueeze(1).to(x.dtype)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel 2i with channel 2i + 1, in fp32. `x` is `[B, heads, T, K]`."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


ROTATE: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "half": rotate_half_style,
    "interleaved": rotate_interleaved,
}

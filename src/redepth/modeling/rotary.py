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
    """cos and sin in fp32, as the config's `rope_style` takes them: for `half` see `for_halves`, for `interleaved` of the
    angles, each `[B, T, half the rotated channels]`."""
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
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    return for_halves(cos, sin) if config.rope_style == "half" else (cos, sin)


def for_halves(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angles, each `[B, T, half the rotated channels]`, as `rotate_half_style` takes them: the factors of
    a channel and of its partner, `[B, T, rotated channels]`."""
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate_half_style(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel i with channel i + half of the rotated ones; the others pass unchanged.

    `x` is `[B, T, heads, K]`; `cos` and `sin` come from `for_halves`.
    """
    rotated = cos.shape[-1]
    cos, sin = cos.unsqueeze(2).to(x.dtype), sin.unsqueeze(2).to(x.dtype)
    rest = None
    if rotated < x.shape[-1]:
        x, rest = x.split([rotated, x.shape[-1] - rotated], dim=-1)
    # All channels in few operations: of a single token each costs more than what it computes.
    turned = x.roll(rotated // 2, -1).mul_(sin).add_(x * cos)
    return turned if rest is None else torch.cat([turned, rest], dim=-1)


def rotate_interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channel 2i with channel 2i + 1, in fp32. `x` is `[B, T, heads, K]`."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


ROTATE: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "half": rotate_half_style,
    "interleaved": rotate_interleaved,
}

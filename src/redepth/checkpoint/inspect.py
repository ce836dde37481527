"""What a checkpoint is, from its configuration and headers; no weights are read."""

from pathlib import Path
from typing import Any

import torch

from redepth.modeling import RecurrentDepthConfig
from redepth.modeling.cache_rules import parse_cache_rule
from redepth.modeling.configuration import LRU_LAYER
from redepth.modeling.policy import split_num_steps
from redepth.modeling.quantizer import DepthQuantizationConfig

from .cost import count_parameters
from .folder import HEALING_FILE, read_json, read_recipe
from .load import read_config


def cache_bytes_per_token(config: RecurrentDepthConfig, num_steps: int, rule: str | None = None) -> int:
    """Bytes of keys and values that one token leaves behind after `num_steps` steps under a cache rule.

    Args:
        rule: the config's by default.
    """
    kept = parse_cache_rule(rule if rule is not None else config.cache_rule).places(num_steps)
    _, layers = _layer_steps(config, kept)
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    return layers * 2 * config.num_key_value_heads * config.head_dim * _dtype(config).itemsize


def recurrent_bytes(config: RecurrentDepthConfig, num_steps: int, rule: str | None = None) -> int:
    """Bytes that the recurrent layers hold for one row after `num_steps` steps, however long its text is.

    Args:
        rule: the config's by default.
    """
    kept = parse_cache_rule(rule if rule is not None else config.cache_rule).places(num_steps)
    recurrences, _ = _layer_steps(config, kept)
    # The state is fp32; the convolution's last inputs are as the model computes.
    bytes_per_channel = 4 + (config.conv1d_width - 1) * _dtype(config).itemsize
    return recurrences * (config.lru_width or 0) * bytes_per_channel


def _layer_steps(config: RecurrentDepthConfig, kept_steps: int) -> tuple[int, int]:
    """How many recurrent and attention layers leave something in the cache; those of the core count once a step."""
    assert config.n_layers is not None
    core = range(config.n_layers_in_prelude, config.n_layers - config.n_layers_in_coda)
    counts = {True: 0, False: 0}
    for layer in range(config.n_layers):
        counts[config.layer_type(layer) == LRU_LAYER] += kept_steps if layer in core else 1
    return counts[True], counts[False]


def _dtype(config: RecurrentDepthConfig) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def inspect(
    checkpoint: str | Path, depths: tuple[int, ...] = (1, 4, 8, 16, 32), cache_rule: str | None = None
) -> dict[str, Any]:
    """Kind, plan, parameters by part, memory by depth, and the depth a checkpoint was trained for.

    Args:
        checkpoint: folder or hub id.
        depths: numbers of steps for which to give the size of the cache.
        cache_rule: the rule for which to give it; the config's by default.

    Raises:
        RedepthError: where there is no such checkpoint.
    """
    for depth in depths:
        split_num_steps(depth)  # which refuses what is no number of steps
    config, kind = read_config(checkpoint)
    rule = cache_rule if cache_rule is not None else config.cache_rule
    folder = Path(checkpoint)
    recipe = read_recipe(folder)
    healing = read_json(folder / HEALING_FILE) or {}
    converted = recipe.get("convert")
    if kind is not None:
        origin = f"published, {kind.name}"
    elif converted is not None:
        origin = f"converted by redepth from {converted['source']}"
    else:
        origin = "made by redepth"
    quantization = getattr(config, "quantization_config", None)
    count = count_parameters(config)
    layers = {
        "prelude": config.n_layers_in_prelude,
        "core": config.n_layers_in_recurrent_block,
        "coda": config.n_layers_in_coda,
    }
    return {
        "checkpoint": str(checkpoint),
        "kind": origin,
        "block": {
            "norm_placement": config.norm_placement,
            "rope_style": config.rope_style,
            "qk_norm": config.qk_norm,
            "sliding_window": config.sliding_window,
            "recurrent_layers": _layer_steps(config, 1)[0] or None,
        },
        "layers": layers,
        "source_layers": {group: converted[group] for group in layers} if converted else None,
        "parameters": count.by_part(),
        "initial_state": config.initial_state_mode,
        "dtype": str(_dtype(config)).removeprefix("torch."),
        "quantization": str(DepthQuantizationConfig(**quantization)) if quantization is not None else None,
        "mean_recurrence": config.mean_recurrence,
        "mean_backprop_depth": config.mean_backprop_depth,
        "healed_tokens": healing.get("tokens"),
        "max_tokens": config.block_size,
        "default_num_steps": config.default_num_steps,
        "depth_profile": config.depth_profile,
        "cache_rule": rule,
        "state_bytes_per_token": config.n_embd * _dtype(config).itemsize,
        "cache_bytes_per_token": {depth: cache_bytes_per_token(config, depth, rule) for depth in depths},
        "recurrent_bytes_per_row": {depth: recurrent_bytes(config, depth, rule) for depth in depths},
    }

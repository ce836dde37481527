"""What a checkpoint is, from its configuration and headers; no weights are read."""

from pathlib import Path
from typing import Any

import torch

from redepth.loading import read_config
from redepth.modeling import RecurrentDepthConfig
from redepth.modeling.cache import parse_cache_rule
from redepth.surgery.folder import HEALING_FILE, read_json, read_recipe

from .cost import count_parameters


def cache_bytes_per_token(config: RecurrentDepthConfig, num_steps: int, rule: str | None = None) -> int:
    """Bytes of keys and values that one token leaves behind after `num_steps` steps under a cache rule.

    Args:
        rule: the config's by default.
    """
    kept = parse_cache_rule(rule if rule is not None else config.cache_rule).places(num_steps)
    layers = config.n_layers_in_prelude + kept * config.n_layers_in_recurrent_block + config.n_layers_in_coda
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    return layers * 2 * config.num_key_value_heads * config.head_dim * _dtype(config).itemsize


def _dtype(config: RecurrentDepthConfig) -> torch.dtype:
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def inspect(
    checkpoint: str | Path, depths: tuple[int, ...] = (1, 4, 8, 16, 32), cache_rule: str | None = None
) -> dict[str, Any]:
    """Kind, plan, parameters by part, memory by depth, and the depth a checkpoint was trained for.

    Args:
        checkpoint: folder or hub id.
        depths: numbers of steps to give the cache's bytes for.
        cache_rule: the rule to give them under; the config's by default.

    Raises:
        RedepthError: where there is no such checkpoint.
    """
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
        },
        "layers": layers,
        "source_layers": {group: converted[group] for group in layers} if converted else None,
        "parameters": count.by_part(),
        "initial_state": config.initial_state_mode,
        "dtype": str(_dtype(config)).removeprefix("torch."),
        "mean_recurrence": config.mean_recurrence,
        "mean_backprop_depth": config.mean_backprop_depth,
        "healed_tokens": healing.get("tokens"),
        "max_tokens": config.block_size,
        "default_num_steps": config.default_num_steps,
        "depth_profile": config.depth_profile,
        "cache_rule": rule,
        "state_bytes_per_token": config.n_embd * _dtype(config).itemsize,
        "cache_bytes_per_token": {depth: cache_bytes_per_token(config, depth, rule) for depth in depths},
    }

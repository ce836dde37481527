"""What a checkpoint is, from its configuration and headers; no weights are read."""

from pathlib import Path
from typing import Any

from redepth.errors import RedepthError
from redepth.modeling.cache_rules import parse_cache_rule
from redepth.modeling.fields import LRU_LAYER, RecurrentDepthFields
from redepth.modeling.published_kinds import Kind
from redepth.modeling.quantization import METHOD, DepthQuantization

from .cost import count_parameters
from .folder import HEALING_FILE, VERIFICATION_FILE, read_json, read_recipe
from .recorded import DTYPE_BYTES, find_folder, read_plainly, weights_of


def cache_bytes_per_token(config: RecurrentDepthFields, num_steps: int, rule: str | None = None) -> int:
    """Bytes of keys and values that one token leaves behind after `num_steps` steps under a cache rule.

    Args:
        rule: the config's by default.
    """
    kept = parse_cache_rule(rule if rule is not None else config.cache_rule).places(num_steps)
    _, layers = _layer_steps(config, kept)
    assert config.num_key_value_heads is not None
    assert config.head_dim is not None
    return layers * 2 * config.num_key_value_heads * config.head_dim * DTYPE_BYTES[_dtype(config)]


def recurrent_bytes(config: RecurrentDepthFields, num_steps: int, rule: str | None = None) -> int:
    """Bytes that the recurrent layers hold for one row after `num_steps` steps, however long its text is.

    Args:
        rule: the config's by default.
    """
    kept = parse_cache_rule(rule if rule is not None else config.cache_rule).places(num_steps)
    recurrences, _ = _layer_steps(config, kept)
    # The state is fp32; the convolution's last inputs are as the model computes.
    bytes_per_channel = 4 + (config.conv1d_width - 1) * DTYPE_BYTES[_dtype(config)]
    return recurrences * (config.lru_width or 0) * bytes_per_channel


def _layer_steps(config: RecurrentDepthFields, kept_steps: int) -> tuple[int, int]:
    """How many recurrent and attention layers leave something in the cache; those of the core count once a step."""
    assert config.n_layers is not None
    core = range(config.n_layers_in_prelude, config.n_layers - config.n_layers_in_coda)
    counts = {True: 0, False: 0}
    for layer in range(config.n_layers):
        counts[config.layer_type(layer) == LRU_LAYER] += kept_steps if layer in core else 1
    return counts[True], counts[False]


def _dtype(config: RecurrentDepthFields) -> str:
    """The name of the recorded dtype; fp32 where none is."""
    recorded = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return recorded if recorded in DTYPE_BYTES else "float32"


def _configuration(checkpoint: str | Path) -> tuple[RecurrentDepthFields, Kind | None]:
    """As `load.read_config`, without importing what loads models wherever the files themselves say enough."""
    folder = find_folder(checkpoint)
    plain = read_plainly(folder) if folder is not None else None
    if plain is not None:
        return plain
    from .load import read_config

    return read_config(checkpoint)


def _check_depth(depth: Any) -> None:
    """Refuse what is no number of steps."""
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        from redepth.modeling.policy import split_num_steps

        split_num_steps(depth)


def _record(file: Path) -> dict[str, Any]:
    """A record of redepth's; empty where there is none."""
    content = read_json(file)
    if content is not None and not isinstance(content, dict):
        raise RedepthError(f"{file} is not the record that redepth writes, a table; restore or remove it")
    return content or {}


def _quantization(config: RecurrentDepthFields) -> str | None:
    record = getattr(config, "quantization_config", None)
    if record is None:
        return None
    record = record if isinstance(record, dict) else record.to_dict()
    method = record.get("quant_method")
    return str(DepthQuantization(**record)) if method == METHOD else f"by {method}"


def inspect(
    checkpoint: str | Path, depths: tuple[int, ...] = (1, 4, 8, 16, 32), cache_rule: str | None = None
) -> dict[str, Any]:
    """Kind, plan, parameters by part, memory by depth, what was verified, and the depth a checkpoint was trained for.

    Of a local checkpoint only config.json, the records and the headers of its weights are read, and no code that loads
    models is imported.

    Args:
        checkpoint: folder or hub id.
        depths: numbers of steps for which to give the size of the cache.
        cache_rule: the rule for which to give it; the config's by default.

    Raises:
        RedepthError: where there is no such checkpoint.
    """
    for depth in depths:
        _check_depth(depth)
    config, kind = _configuration(checkpoint)
    rule = cache_rule if cache_rule is not None else config.cache_rule
    folder = Path(checkpoint).expanduser()
    recipe = read_recipe(folder)
    healing, verification = (_record(folder / file) for file in (HEALING_FILE, VERIFICATION_FILE))
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
            "recurrent_layers": _layer_steps(config, 1)[0] or None,
        },
        "layers": layers,
        "source_layers": {group: converted[group] for group in layers} if converted else None,
        "parameters": count.by_part(),
        "initial_state": config.initial_state_mode,
        "weights": weights_of(folder),
        "dtype": _dtype(config),
        "quantization": _quantization(config),
        "verified": verification.get("passed"),
        "mean_recurrence": config.mean_recurrence,
        "mean_backprop_depth": config.mean_backprop_depth,
        "healed_tokens": healing.get("tokens"),
        "max_tokens": config.block_size,
        "default_num_steps": config.default_num_steps,
        "depth_profile": config.depth_profile,
        "cache_rule": rule,
        "state_bytes_per_token": config.n_embd * DTYPE_BYTES[_dtype(config)],
        "cache_bytes_per_token": {depth: cache_bytes_per_token(config, depth, rule) for depth in depths},
        "recurrent_bytes_per_row": {depth: recurrent_bytes(config, depth, rule) for depth in depths},
    }

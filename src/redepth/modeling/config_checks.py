"""What each field of a configuration may hold: one table, checked before anything is derived from the configuration."""

from collections.abc import Collection, Mapping
from typing import Any

from .cache_rules import parse_cache_rule
from .errors import UserError

# Names of fields by what they hold; a ? means that null is allowed.
COUNTS = "vocab_size n_embd n_heads intermediate_size block_size mean_backprop_depth conv1d_width max_num_steps"
COUNTS_OR_NULL = "num_key_value_heads head_dim sliding_window lru_width num_steps"
INTEGERS = "n_layers_in_prelude n_layers_in_recurrent_block n_layers_in_coda"
ABOVE_ZERO = "norm_eps rope_base mean_recurrence"
ABOVE_ZERO_OR_NULL = "query_scale attn_logit_softcapping final_logit_softcapping"
NOT_NEGATIVE_OR_NULL = "state_std state_scale"
SWITCHES = "tie_embeddings use_cache qkv_bias qk_bias proj_bias mlp_bias norm_before_coda state_gate"
TABLES_OR_NULL = "rope_parameters depth_profile init_values"
# The kinds of rotary positions that transformers knew when this was written; a configuration asks it for today's.
ROPE_TYPES: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
CHOICES: dict[str, tuple[Any, ...]] = {
    "norm_placement": ("pre", "post", "sandwich", "huginn"),
    "norm_weight": ("plain", "one_plus"),
    "activation": ("silu", "gelu_pytorch_tanh"),
    "qk_norm": ("head", "full", None),
    "rope_style": ("half", "interleaved"),
}


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


# For each kind of field: its names, what a value must be, and the words for it.
TABLE = (
    (COUNTS, lambda v: _is_integer(v) and v >= 1, "an integer of at least 1"),
    (COUNTS_OR_NULL, lambda v: v is None or (_is_integer(v) and v >= 1), "an integer of at least 1, or null"),
    (INTEGERS, lambda v: _is_integer(v) and v >= 0, "an integer of at least 0"),
    ("state_seed", _is_integer, "an integer"),
    (ABOVE_ZERO, lambda v: _is_number(v) and v > 0, "a number above 0"),
    (ABOVE_ZERO_OR_NULL, lambda v: v is None or (_is_number(v) and v > 0), "a number above 0, or null"),
    (NOT_NEGATIVE_OR_NULL, lambda v: v is None or (_is_number(v) and v >= 0), "a number of at least 0, or null"),
    (SWITCHES, lambda v: isinstance(v, bool), "true or false"),
    (TABLES_OR_NULL, lambda v: v is None or isinstance(v, Mapping), "a table, or null"),
    ("layer_types rope_layers", lambda v: v is None or isinstance(v, (list, tuple)), "a list, or null"),
    ("initial_state_mode cache_rule", lambda v: isinstance(v, str), "a name"),
)


def check_fields(config: Any) -> None:
    """Raises ValueError for the first field whose value no model can have."""
    for names, fits, wanted in TABLE:
        for name in names.split():
            value = getattr(config, name)
            if not fits(value):
                raise UserError(f"{name} is {value!r}, but must be {wanted}")
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            known = ", ".join("null" if choice is None else choice for choice in choices)
            raise UserError(f"{name} is {getattr(config, name)!r}, but must be one of {known}")
    for name, value in (config.init_values or {}).items():
        if not _is_number(value):
            raise UserError(f"init_values[{name!r}] is {value!r}, but must be a number")
    parse_cache_rule(config.cache_rule)
    _check_profile(config.depth_profile)


def check_rope(parameters: Mapping[str, Any] | None, known: Collection[str] = ROPE_TYPES) -> None:
    """Raises UserError for rotary parameters of no known kind or without a base; one table, or one by layer type."""
    by_layer_type = [one for one in (parameters or {}).values() if isinstance(one, Mapping)]
    for one in by_layer_type or [parameters or {"rope_type": "default", "rope_theta": 1.0}]:
        kind, base = one.get("rope_type"), one.get("rope_theta")
        if kind not in known:
            names = ", ".join(dict.fromkeys(known))
            raise UserError(f"rope_parameters has the rope_type {kind!r}, but it must be one of {names}")
        if base is None or not _is_number(base) or base <= 0:
            raise UserError(f"rope_parameters has the rope_theta {base!r}, but it must be a number above 0")


def _check_profile(profile: Any) -> None:
    if profile is None:
        return
    steps, valid = profile.get("num_steps"), profile.get("valid_range")
    if not _is_integer(steps) or steps < 1:
        raise UserError(
            f"depth_profile has num_steps {steps!r}, but it must be an integer of at least 1; calibrate again"
        )
    if not isinstance(valid, (list, tuple)) or len(valid) != 2 or not all(map(_is_integer, valid)):
        raise UserError(f"depth_profile has valid_range {valid!r}, but it must be two integers; calibrate again")

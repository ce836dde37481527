"""Fresh models by name: shapes that `redepth new` makes with the published initialisation."""

from typing import TYPE_CHECKING, Any

from redepth.errors import RedepthError, one_line

if TYPE_CHECKING:
    from redepth.modeling import RecurrentDepthConfig

PRESETS: dict[str, dict[str, Any]] = {
    # Runs in a test.
    "nano": {
        "n_embd": 128,
        "n_heads": 4,
        "intermediate_size": 384,
        "n_layers_in_prelude": 1,
        "n_layers_in_recurrent_block": 2,
        "n_layers_in_coda": 1,
        "vocab_size": 2048,
        "block_size": 512,
        "mean_recurrence": 4,
        "mean_backprop_depth": 4,
    },
    "100m": {
        "n_embd": 768,
        "n_heads": 12,
        "intermediate_size": 2560,
        "n_layers_in_prelude": 2,
        "n_layers_in_recurrent_block": 4,
        "n_layers_in_coda": 2,
        "vocab_size": 49152,
        "block_size": 2048,
        "mean_recurrence": 8,
    },
    # Huginn-0125 (Geiping et al. 2025, section 4): the configuration's own defaults.
    "huginn-3.5b": {},
}


def preset_config(name: str, **changes: Any) -> "RecurrentDepthConfig":
    """The configuration of a preset, with `changes` (those that are not None) laid over it.

    Raises:
        RedepthError: for an unknown preset, or changes that no model can have.
    """
    if name not in PRESETS:
        raise RedepthError(f"preset {name!r} is unknown; use {', '.join(PRESETS)}")
    from redepth.modeling import RecurrentDepthConfig  # which imports torch; the names alone are cheap

    given = {key: value for key, value in changes.items() if value is not None}
    try:
        return RecurrentDepthConfig(**PRESETS[name] | given)
    except ValueError as error:
        raise RedepthError(f"preset {name}: {one_line(error)}") from None

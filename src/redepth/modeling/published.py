"""Published checkpoints: their config is completed by what their tensor names say, and what was inferred is tried."""

import json
import math
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file

from .configuration import RecurrentDepthConfig
from .errors import UserError
from .published_kinds import INFERRED, Kind, fill_in, find_kind

logger = logging.get_logger(__name__)

# What `check_better_than_chance` is meant to read.
BUILT_IN_TEXT = (
    "The sun rose over the hills, and the village woke. A baker carried warm bread to the market, where people met to talk "
    "about the weather, the price of apples and the news from the city. Children ran to school with books under their arms. "
    "By noon it was hot, and the streets were quiet again."
)


def tensor_names(checkpoint: Any, **where: Any) -> list[str] | None:
    """Names of the tensors in a folder's or hub id's safetensors files; None where it has none."""
    index = cached_file(checkpoint, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **where)
    if index is not None:
        with open(index, encoding="utf-8") as text:
            return list(json.load(text)["weight_map"])
    file = cached_file(checkpoint, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **where)
    if file is None:
        return None
    with safe_open(file, framework="pt") as reader:
        return list(reader.keys())


def complete_config(config: RecurrentDepthConfig, checkpoint: Any, **where: Any) -> Kind | None:
    """Set the switches that a published checkpoint's config file does not mention.

    Args:
        config: as read from the file; changed in place.
        checkpoint: folder or hub id.
        where: hub arguments, such as `revision`.

    Returns:
        the published kind, or None where the file states its switches itself.

    Raises:
        ValueError: for a checkpoint that fits no published kind.
    """
    written, _ = RecurrentDepthConfig.get_config_dict(checkpoint, **where)
    names = None if "norm_placement" in written else tensor_names(checkpoint, **where)
    if names is None:
        return None
    kind = find_kind(names)
    fill_in(config, written, kind)
    if kind.is_inferred:
        switches = {key: getattr(config, key) for key in (*kind.switches, *INFERRED)}
        switches["embed_scale"] = config.embed_scale
        said = ", ".join(f"{key}={value}" for key, value in switches.items() if value is not None)
        logger.warning(f"{checkpoint} does not say how its blocks work; taken for a {kind.name} by its tensors: {said}")
        if written.get("sliding_window") and config.layer_types is None:
            logger.warning(
                f"its sliding_window={config.sliding_window} has no layer_types beside it: every layer reads everything, which "
                "is the same up to so many tokens"
            )
    return kind


@torch.no_grad()
def check_better_than_chance(model: Any, input_ids: torch.Tensor) -> None:
    """Look whether what was inferred of a checkpoint makes a language model of it.

    Args:
        model: in eval mode.
        input_ids: `[1, T]`, of `BUILT_IN_TEXT` or another text in a language that it was trained on.

    Raises:
        ValueError: where its mean loss, in nats, is no lower than that of an even guess among its tokens.
    """
    steps, chance = model.config.mean_recurrence, math.log(model.config.vocab_size)
    input_ids = input_ids[:, : model.config.block_size]
    loss = float(model(input_ids, labels=input_ids, num_steps=steps, use_cache=False).loss)
    if not loss < chance:
        raise UserError(
            f"its loss on plain English at {steps} steps is {loss:.2f}, no better than chance ({chance:.2f}): what was "
            "inferred from its tensors' names is wrong; write the switches into its config"
        )

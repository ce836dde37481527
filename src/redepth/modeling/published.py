"""The kinds of published checkpoints. Their configs do not say which kind they are; their tensor names do."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from transformers.utils.hub import cached_file

from .configuration import RecurrentDepthConfig
from .errors import UserError

logger = logging.get_logger(__name__)

# What `check_better_than_chance` is meant to read.
BUILT_IN_TEXT = (
    "The sun rose over the hills, and the village woke. A baker carried warm bread to the market, where people met to talk "
    "about the weather, the price of apples and the news from the city. Children ran to school with books under their arms. "
    "By noon it was hot, and the streets were quiet again."
)
# Keys beside a kind's own switches that are named when they were inferred.
INFERRED = ("query_scale", "head_dim", "layer_types", "state_std")

_BLOCK = ("attn.Wqkv.weight", "attn.proj.weight", "mlp.fc.weight", "mlp.proj.weight", "norm_1.weight", "norm_2.weight")
_OUTER = {
    "transformer.wte.weight",
    "transformer.adapter.weight",
    "transformer.ln_f.weight",
    "lm_head.weight",
    "freqs_cis",
}
_LAYER = re.compile(r"transformer\.(?:prelude|core_block|coda)\.\d+\.(.+)")
# The std with which the retrofitted uploads draw s_0 when their config does not give one.
RETROFIT_STATE_STD = 0.008703882797784892


@dataclass(frozen=True)
class Kind:
    """A published kind: the tensors of one block, and the switches that its config leaves out."""

    name: str
    block: frozenset[str]
    switches: dict[str, Any]
    # Whether the switches are a conclusion from the tensors' names alone, that only a look at the model's text can
    # prove.
    is_inferred: bool = False


_RETROFIT: dict[str, Any] = {
    "norm_placement": "pre",
    "rope_style": "half",
    "qk_bias": False,
    "norm_before_coda": False,
    "state_scale": 1.0,
}
KINDS = (
    Kind(
        "huginn",
        frozenset({*_BLOCK, "norm_3.weight", "norm_4.weight", "attn.qk_bias"}),
        {"norm_placement": "huginn"},
    ),
    Kind("retrofitted llama", frozenset(_BLOCK), _RETROFIT),
    # Its published configs say little: what is Gemma 2's own is taken from there, and said when it is loaded.
    Kind(
        "retrofitted gemma2",
        frozenset({*_BLOCK, "norm_3.weight", "norm_4.weight"}),
        _RETROFIT
        | {
            "norm_placement": "sandwich",
            "norm_weight": "one_plus",
            "activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        is_inferred=True,
    ),
    Kind(
        "retrofitted olmo2",
        frozenset({*_BLOCK, "attn.q_norm.weight", "attn.k_norm.weight"}),
        _RETROFIT | {"norm_placement": "post", "qk_norm": "full"},
    ),
)


def find_kind(tensor_names: Iterable[str]) -> Kind:
    """The kind whose block has just these tensors.

    Raises:
        ValueError: naming the tensors that fit no kind.
    """
    block, strange = set(), set()
    for name in tensor_names:
        layer = _LAYER.fullmatch(name)
        if layer is not None:
            block.add(layer.group(1))
        elif name not in _OUTER:
            strange.add(name)
    nearest = min(KINDS, key=lambda kind: len(kind.block ^ block))
    if strange or nearest.block != block:
        extra, missing = sorted(strange | (block - nearest.block)), sorted(nearest.block - block)
        raise UserError(
            f"the checkpoint fits no published kind ({', '.join(kind.name for kind in KINDS)}); nearest {nearest.name}: "
            f"no place for {extra[:4] or 'none'}, missing {missing[:4] or 'none'}"
        )
    return nearest


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
    for key, value in kind.switches.items():
        if key not in written:
            setattr(config, key, value)
    if kind.switches["norm_placement"] != "huginn":
        assert config.init_values is not None
        start = written.get("init_values") or {}
        usual_scale = config.n_embd**0.5 if kind.is_inferred else 1.0
        config.init_values["embed_scale"] = start.get("embed_scale", usual_scale)
        if "state_std" not in written:
            config.state_std = start.get("std", RETROFIT_STATE_STD)
    if kind.is_inferred:
        if "query_scale" not in written and written.get("query_pre_attn_scalar"):
            config.query_scale = written["query_pre_attn_scalar"] ** -0.5
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

"""The published checkpoints' kinds. Their configs do not say which they are; their tensor names do."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .configuration import RecurrentDepthConfig
from .errors import UserError

_BLOCK = ("attn.Wqkv.weight", "attn.proj.weight", "mlp.fc.weight", "mlp.proj.weight", "norm_1.weight", "norm_2.weight")
_OUTER = {
    "transformer.wte.weight",
    "transformer.adapter.weight",
    "transformer.ln_f.weight",
    "lm_head.weight",
    "freqs_cis",
}
_LAYER = re.compile(r"transformer\.(?:prelude|core_block|coda)\.\d+\.(.+)")
# What the retrofitted uploads draw s_0 with when their config does not say.
RETROFIT_STATE_STD = 0.008703882797784892


@dataclass(frozen=True)
class Kind:
    """A published kind: the tensors of one block, and the switches that its config leaves out."""

    name: str
    block: frozenset[str]
    switches: dict[str, Any]


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
    """Set the switches that a published checkpoint's config file leaves open.

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
        config.init_values["embed_scale"] = start.get("embed_scale", 1.0)
        if "state_std" not in written:
            config.state_std = start.get("std", RETROFIT_STATE_STD)
    return kind

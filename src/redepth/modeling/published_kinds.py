"""The kinds of published checkpoints. Their configs do not say which kind they are; their tensor names do."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UserError
from .fields import RecurrentDepthFields

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


def fill_in(config: RecurrentDepthFields, written: Mapping[str, Any], kind: Kind) -> None:
    """Set the switches of a kind that a published config file does not mention.

    Args:
        config: as read from the file; changed in place.
        written: what the file holds.
    """
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
    if kind.is_inferred and "query_scale" not in written and written.get("query_pre_attn_scalar"):
        config.query_scale = written["query_pre_attn_scalar"] ** -0.5

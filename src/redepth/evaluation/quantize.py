"""A checkpoint with its weights in 8 or 4 bits, measured beside the one it was made from before it is written."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from redepth.checkpoint.card import write_card
from redepth.checkpoint.folder import (
    DEFAULT_SHARD_SIZE,
    EVALUATION_FILE,
    QUANTIZATION_FILE,
    VERIFICATION_FILE,
    CheckpointFolder,
    write_json,
)
from redepth.checkpoint.load import check_unquantized, load
from redepth.checkpoint.republish import KEPT_FILES
from redepth.checkpoint.shards import save_definition, write_shards
from redepth.checkpoint.sources import Source
from redepth.errors import RedepthError
from redepth.modeling import RecurrentDepthForCausalLM
from redepth.modeling.quantizer import DepthQuantizationConfig, quantize_model, quantized_tensors

DEPTHS = (1, 4, 16, 32)
LARGEST_LOSS = 0.02  # nats that quantisation may cost at any of DEPTHS, unless told otherwise
TOKENS_AT_ONCE = 64  # whose logits are widened to fp32


@torch.inference_mode()
def compare_by_depth(
    model: RecurrentDepthForCausalLM,
    quantized: RecurrentDepthForCausalLM,
    tokens: torch.Tensor,
    on_row: Callable[[int, int], None] | None = None,
) -> dict[int, dict[str, float]]:
    """A quantised model beside the one it was made from, after each of DEPTHS steps.

    Args:
        tokens: `[rows, tokens]`, without padding.
        on_row: called with (rows done, rows in all).

    Returns:
        by number of steps: `loss_before` and `loss`, in nats per token; `kl`, KL(before ‖ after) in nats; and
        `top1_agreement`, the share of tokens with the same likeliest next one.
    """
    names = ("loss_before", "loss", "kl", "top1_agreement")
    sums = {depth: dict.fromkeys(names, 0.0) for depth in DEPTHS}
    for row, ids in enumerate(tokens.split(1), 1):
        both = zip(*(one.states_by_step(ids, max(DEPTHS)) for one in (model, quantized)), strict=True)
        for depth, states in enumerate(both):
            if depth not in sums:
                continue
            logits = [
                one.predict_from_latents(state).logits[0, :-1]  # type: ignore[index]
                for one, state in zip((model, quantized), states, strict=True)
            ]
            for first in range(0, len(logits[0]), TOKENS_AT_ONCE):
                part = slice(first, first + TOKENS_AT_ONCE)
                before, after = (F.log_softmax(table[part].float(), dim=-1) for table in logits)
                wanted = ids[0, 1:][part]
                found = (
                    F.nll_loss(before, wanted, reduction="sum"),
                    F.nll_loss(after, wanted, reduction="sum"),
                    F.kl_div(after, before, reduction="sum", log_target=True),
                    (before.argmax(-1) == after.argmax(-1)).sum(),
                )
                for name, value in zip(names, found, strict=True):
                    sums[depth][name] += value.item()
        if on_row is not None:
            on_row(row, len(tokens))
    predicted = len(tokens) * (tokens.shape[1] - 1)
    return {depth: {name: total / predicted for name, total in found.items()} for depth, found in sums.items()}


def quantize(
    source: Source,
    out: Path,
    config: DepthQuantizationConfig,
    tokens: torch.Tensor,
    data: str,
    largest_loss: float = LARGEST_LOSS,
    overwrite: bool = False,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    on_row: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a quantised copy of a recurrent checkpoint, unless that costs too much.

    Args:
        source: an unquantised one.
        out: folder to write.
        tokens: held-out text, `[rows, tokens]`.
        data: what the text is, for the record.
        largest_loss: nats of loss that it may cost at any of DEPTHS.

    Returns:
        the record: `bits`, `kind`, `groups`, `tokens`, `data`, and by depth what `compare_by_depth` gives.

    Raises:
        RedepthError: for a checkpoint that is not recurrent in depth or is quantised already, and for a loss above
            `largest_loss`; nothing is left at `out`.
    """
    model: Any = load(source.folder, torch.float32)
    if not isinstance(model, RecurrentDepthForCausalLM):
        raise RedepthError(f"checkpoint {source.name!r} has no depth; redepth quantises models recurrent in depth")
    check_unquantized(source.name, model.config, "be quantised again")
    quantized: Any = load(source.folder, torch.float32)
    quantize_model(quantized, config)
    depths = compare_by_depth(model, quantized, tokens, on_row)
    costs = {depth: found["loss"] - found["loss_before"] for depth, found in depths.items()}
    worst = max(costs, key=lambda depth: costs[depth])
    if not costs[worst] <= largest_loss:
        raise RedepthError(
            f"{config} raises the loss by {costs[worst]:.3f} nats at r = {worst}, more than {largest_loss:g}; use more bits "
            "or fewer groups, or allow it with --largest-loss"
        )
    record = {
        "bits": config.bits,
        "kind": config.kind,
        "groups": config.groups,
        "tokens": tokens.numel(),
        "data": data,
        "depths": depths,
    }
    del model
    kept_dtype = quantized_tensors(load_definition(quantized.config), config)
    saved = source.dtype
    tensors = quantized.state_dict()
    if quantized.config.tie_embeddings:
        del tensors["lm_head.weight"]
    written = ((name, tensor if name in kept_dtype else tensor.to(saved)) for name, tensor in sorted(tensors.items()))
    with CheckpointFolder(out).replacing(overwrite, [source.location]) as folder:
        write_shards(written, folder, len(tensors), max_shard_size, None)
        save_definition(quantized.config, folder, saved)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
        source.generation_config().save_pretrained(folder)
        for name in KEPT_FILES - {VERIFICATION_FILE, EVALUATION_FILE}:
            if (source.folder / name).is_file():
                shutil.copy2(source.folder / name, folder / name)
        write_json(folder / QUANTIZATION_FILE, record)
        write_card(folder, CheckpointFolder(out).path.name)
    return record


def load_definition(config: Any) -> RecurrentDepthForCausalLM:
    """A model of the configuration without weights."""
    with torch.device("meta"):
        return RecurrentDepthForCausalLM(config)

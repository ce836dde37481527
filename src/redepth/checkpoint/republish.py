"""Re-save a recurrent checkpoint: other dtype or tying, modelling files and configuration brought up to date."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from redepth.modeling import RecurrentDepthForCausalLM
from redepth.modeling.quantizer import DepthQuantizationConfig, quantized_tensors
from redepth.runtime import parse_dtype

from .card import write_card
from .folder import (
    CARD_FILE,
    DEFAULT_SHARD_SIZE,
    EVALUATION_FILE,
    FAMILY_FILE,
    QUANTIZATION_FILE,
    RECORD_FILES,
    VERIFICATION_FILE,
    CheckpointFolder,
    read_recipe,
    write_recipe,
)
from .load import read_config
from .shards import EMBEDDING, HEAD, save_definition, write_shards
from .sources import Source, open_source

# Kept as they are: what the checkpoint's owner wrote, and redepth's own records.
KEPT_FILES = {CARD_FILE, FAMILY_FILE, "LICENSE", *RECORD_FILES}
# Figures of the very weights, which hold for no others.
MEASURED_FILES = {VERIFICATION_FILE, EVALUATION_FILE, QUANTIZATION_FILE}
ROPE_TABLE = "freqs_cis"


def republish(
    source: str | Path | Source,
    out: str | Path,
    *,
    dtype: str | None = None,
    tie: bool | None = None,
    overwrite: bool = False,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a recurrent checkpoint anew, tensor by tensor, so that it loads in today's transformers.

    Switches that a published config does not mention are written out, saved rope tables are left out, and a tied
    embedding is stored once. Records and card come along; verification and evaluation do not where the dtype changes,
    since they were measured on other weights.

    Args:
        source: folder or hub id of a published or redepth checkpoint.
        out: folder to write; with `overwrite`, a checkpoint that redepth wrote may be there.
        dtype: `float32`, `bfloat16` or `float16`; unchanged by default.
        tie: tie the head to the embedding or not; unchanged by default.
        on_tensor: called with (tensors done, tensors in all).

    Raises:
        RedepthError: for a checkpoint that fits no kind, or one that can't be tied; nothing is left at `out`.
    """
    if not isinstance(source, Source):
        source = open_source(source)
    config, _ = read_config(source.folder)
    saved_dtype, quantized = source.dtype, set[str]()
    if getattr(config, "quantization_config", None) is not None:
        with torch.device("meta"):
            model = RecurrentDepthForCausalLM(config)
        quantized = quantized_tensors(model, DepthQuantizationConfig(**config.quantization_config))
        saved_dtype = config.dtype
    wanted = parse_dtype(dtype) if dtype is not None else saved_dtype
    names = [name for name in source.tensor_names() if name != ROPE_TABLE]
    if tie is not None:
        config.tie_embeddings = tie
    if config.tie_embeddings and HEAD in names:
        source.check_tied(HEAD, EMBEDDING)
        names.remove(HEAD)
    elif not config.tie_embeddings and HEAD not in names:
        names.append(HEAD)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        stored = set(source.tensor_names())
        for name in names:
            tensor = source.read(name if name in stored else EMBEDDING)
            yield name, tensor if name in quantized else tensor.to(wanted)

    with CheckpointFolder(out).replacing(overwrite, [source.location]) as folder:
        write_shards(tensors(), folder, len(names), max_shard_size, on_tensor)
        save_definition(config, folder, wanted)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
        source.generation_config().save_pretrained(folder)
        kept = KEPT_FILES if wanted == saved_dtype else KEPT_FILES - MEASURED_FILES
        for name in kept:
            if (source.folder / name).is_file():
                shutil.copy2(source.folder / name, folder / name)
        recipe = read_recipe(folder)
        if "convert" in recipe:
            as_written = {"dtype": str(wanted).removeprefix("torch."), "tie": config.tie_embeddings}
            write_recipe(folder, recipe | {"convert": recipe["convert"] | as_written})
            write_card(folder, CheckpointFolder(out).path.name)
    return Path(out)

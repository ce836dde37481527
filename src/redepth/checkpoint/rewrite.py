"""A source written as a transformers checkpoint of its own architecture, without surgery."""

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from redepth.errors import RedepthError
from redepth.runtime import parse_dtype

from .folder import DEFAULT_SHARD_SIZE, CheckpointFolder
from .shards import write_shards
from .sources import Source, open_source


def rewrite(
    source: str | Path | Source,
    out: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    on_tensor: Callable[[int, int], None] | None = None,
) -> Path:
    """Write configuration, tensors and tokenizer of a source, tensor by tensor, so that transformers loads them.

    Args:
        source: hub id, local folder, `.gguf` or `.pt` file, or built-in name.
        out: folder to write; with `overwrite`, a checkpoint that redepth wrote may be there.
        dtype: `float32`, `bfloat16` or `float16`; as it is by default.
        on_tensor: called with (tensors done, tensors in all).

    Raises:
        RedepthError: for a source whose tensors are not those of its architecture; nothing is left at `out`.
    """
    if not isinstance(source, Source):
        source = open_source(source)
    wanted = parse_dtype(dtype) if dtype is not None else source.dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(source.config)
    tied = set(model.all_tied_weights_keys) if source.config.tie_word_embeddings else set()
    names, needed = source.tensor_names(), set(model.state_dict())
    for name in sorted(needed - set(names) - tied):
        raise RedepthError(f"source {source.name!r} lacks tensor {name!r}; is the file whole?")
    for name in sorted(set(names) - needed):
        raise RedepthError(
            f"source {source.name!r} holds tensor {name!r}, which a {type(model).__name__} has no place for"
        )
    with CheckpointFolder(out).replacing(overwrite, [source.location]) as folder:
        tensors = ((name, source.read(name).to(wanted)) for name in names)
        write_shards(tensors, folder, len(names), max_shard_size, on_tensor)
        source.config.architectures = [type(model).__name__]
        source.config.dtype = wanted
        source.config.save_pretrained(folder)
        source.generation_config().save_pretrained(folder)
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(folder)
    return Path(out)

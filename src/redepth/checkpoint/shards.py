"""Writing what a checkpoint consists of: sharded weights, config.json and the modelling files."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.dynamic_module_utils import custom_object_save

from redepth.errors import RedepthError
from redepth.modeling import RecurrentDepthConfig, RecurrentDepthForCausalLM

DEFAULT_SHARD_SIZE = "1GB"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def save_definition(config: RecurrentDepthConfig, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json and the modelling files, so that the folder loads in transformers without redepth."""
    with torch.device("meta"):
        model = RecurrentDepthForCausalLM(config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    custom_object_save(model, folder, config=config)  # type: ignore[arg-type]
    config.save_pretrained(folder)


def write_shards(
    tensors: Iterator[tuple[str, torch.Tensor]],
    folder: Path,
    count: int,
    max_shard_size: str,
    on_tensor: Callable[[int, int], None] | None,
) -> None:
    """Write safetensors files of at most `max_shard_size`, holding one shard in memory at a time."""
    limit = _bytes_of(max_shard_size)
    shards: list[list[str]] = []
    held: dict[str, torch.Tensor] = {}
    total_size = 0

    def flush() -> None:
        if held:
            save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
            shards.append(list(held))
            held.clear()

    for done, (name, tensor) in enumerate(tensors, start=1):
        if sum(other.nbytes for other in held.values()) + tensor.nbytes > limit:
            flush()
        held[name] = tensor
        total_size += tensor.nbytes
        del tensor
        if on_tensor is not None:
            on_tensor(done, count)
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{index}").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index_text = json.dumps(
        {"metadata": {"total_size": total_size}, "weight_map": weight_map}, indent=2, sort_keys=True
    )
    (folder / INDEX_FILE).write_text(index_text + "\n", encoding="utf-8")


def _bytes_of(size: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = size[:-2], size[-2:].upper()
    try:
        limit = int(float(number) * units[unit])
    except (KeyError, ValueError):
        limit = 0
    if limit <= 0:
        raise RedepthError(f"max shard size {size!r} is not a size; write it as 500MB or 2GB")
    return limit

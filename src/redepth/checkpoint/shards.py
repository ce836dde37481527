"""What a checkpoint consists of: sharded weights, written and found; config.json and the modelling files."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.dynamic_module_utils import custom_object_save

from redepth.errors import RedepthError, first_line
from redepth.modeling import RecurrentDepthConfig, RecurrentDepthForCausalLM

from .folder import INDEX_FILE, WEIGHTS_FILE, read_json, stays_inside

# Tensors that more than one verb has to know by name.
EMBEDDING = "transformer.wte.weight"
HEAD = "lm_head.weight"


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
        (folder / "shard-0").rename(folder / WEIGHTS_FILE)
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


def find_tensors(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor of a checkpoint; empty where the folder has no safetensors.

    Raises:
        RedepthError: for an index that is none, or that names a file which is missing or lies outside the folder.
    """
    if not (folder / INDEX_FILE).exists():
        single = folder / WEIGHTS_FILE
        if not single.exists():
            return {}
        with open_safetensors(single) as reader:
            return dict.fromkeys(reader.keys(), single)
    index = read_json(folder / INDEX_FILE)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise RedepthError(f"{folder / INDEX_FILE} has no weight_map of tensors; fetch the checkpoint again")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not stays_inside(file):
            raise RedepthError(
                f"{folder / INDEX_FILE} places {tensor!r} outside the folder, in {file!r}; don't trust it"
            )
        if not (folder / file).exists():
            raise RedepthError(f"{folder / INDEX_FILE} names {file}, which is missing; fetch the checkpoint again")
    return {tensor: folder / file for tensor, file in weight_map.items()}


def open_safetensors(file: Path) -> Any:
    """A reader of the file's tensors.

    Raises:
        RedepthError: for a file that is torn or of another format.
    """
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise RedepthError(
            f"{file} is not a readable safetensors file, perhaps cut short: {first_line(error)}"
        ) from None


def _bytes_of(size: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = size[:-2], size[-2:].upper()
    try:
        limit = int(float(number) * units[unit])
    except (KeyError, ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise RedepthError(f"max shard size {size!r} is not a size; write it as 500MB or 2GB")
    return limit

"""What a local checkpoint's own files say of it, read without torch and transformers, which take seconds to import."""

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from redepth.errors import RedepthError, first_line
from redepth.modeling.fields import RecurrentDepthFields
from redepth.modeling.published_kinds import Kind, fill_in, find_kind

from .folder import (
    CONFIG_FILE,
    INDEX_FILE,
    RECURRENT_MODEL_TYPE,
    WEIGHTS_FILE,
    CheckpointFolder,
    read_json,
    stays_inside,
)

# Bytes of a number.
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
# Keys of a config file that only transformers knows how to read.
TRANSFORMERS_OWN = ("rope_scaling", "per_layer_config", "test_time_noise")


@dataclass(eq=False, repr=False, kw_only=True)
class PlainConfig(RecurrentDepthFields):
    """A configuration as `RecurrentDepthConfig` holds it, for those who only look.

    Attributes:
        dtype: the name under which the weights' dtype is recorded.
        quantization_config: the record of stored quantised weights.
    """

    dtype: str | None = None
    quantization_config: dict[str, Any] | None = None


def find_folder(name: str | Path) -> Path | None:
    """The folder of a local checkpoint, after what a killed process left there was finished; None for a hub id.

    Raises:
        RedepthError: where it is neither, or a folder without a checkpoint.
    """
    text = str(name)
    folder = Path(text).expanduser()
    if folder.is_dir():
        CheckpointFolder(folder).settle()
    if folder.exists() and not (folder / CONFIG_FILE).is_file():
        raise RedepthError(f"{text!r} has no config.json; give a folder made by redepth convert")
    if not folder.exists() and (text.startswith((".", "/", "~")) or text.count("/") != 1):
        raise RedepthError(f"checkpoint {text!r} does not exist; make one with redepth convert")
    return folder if folder.exists() else None


def read_plainly(folder: Path) -> tuple[PlainConfig, Kind | None] | None:
    """A checkpoint's configuration, complete, and its published kind, as `load.read_config` gives them.

    Returns:
        None where anything about it is unusual or wrong, which `load.read_config` has the words for.
    """
    try:
        written = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if written.get("model_type") != RECURRENT_MODEL_TYPE or any(written.get(key) for key in TRANSFORMERS_OWN):
            return None
        names = {field.name for field in fields(PlainConfig)}
        config = PlainConfig(**{key: value for key, value in written.items() if key in names})
        config.dtype = config.dtype or written.get("torch_dtype") or "float32"
        config.derive({key: value for key, value in written.items() if key not in names})
        config.validate_architecture()
        aliases = {alias: name for alias, name in config.attribute_map.items() if alias in written}
        if config.dtype not in DTYPE_BYTES or any(
            written[alias] != getattr(config, name) for alias, name in aliases.items()
        ):
            return None
        if "norm_placement" in written:
            return config, None
        tensors = tensor_headers(folder)
        kind = find_kind(tensors) if tensors else None
        if kind is not None:
            fill_in(config, written, kind)
        return None if kind is not None and kind.is_inferred else (config, kind)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def tensor_headers(folder: Path) -> dict[str, dict[str, Any]]:
    """What the safetensors files of a checkpoint say of each tensor: `dtype`, `shape`, `data_offsets`, and its `file`.

    Raises:
        RedepthError: for a file that is missing, torn or of another format.
    """
    files = [WEIGHTS_FILE] if (folder / WEIGHTS_FILE).exists() else []
    index = read_json(folder / INDEX_FILE)
    if index is not None:
        listed = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise RedepthError(f"{folder / INDEX_FILE} has no weight_map of tensors; fetch the checkpoint again")
        files = sorted(name for name in set(listed.values()) if stays_inside(name))
    return {
        tensor: said | {"file": name}
        for name in files
        for tensor, said in _header(folder / name).items()
        if tensor != "__metadata__"
    }


def _header(file: Path) -> dict[str, Any]:
    """The table at a safetensors file's beginning, behind the eight bytes of its length."""
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            size = os.fstat(stream.fileno()).st_size
            if not 2 <= length <= size - 8:
                raise ValueError("its header is cut off")
            header = json.loads(stream.read(length))
        ends = [said["data_offsets"][1] for name, said in header.items() if name != "__metadata__"]
        if max(ends, default=0) != size - 8 - length:
            raise ValueError("its size is not what its header says")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RedepthError(
            f"{file} is not a readable safetensors file, perhaps cut short: {first_line(error)}"
        ) from None
    return header


def weights_of(folder: Path) -> dict[str, int] | None:
    """How many files, tensors, numbers and bytes a checkpoint's weights are; None where it has none.

    A number that is stored packed with others counts as they do, once a byte or more.

    Raises:
        RedepthError: as `tensor_headers`.
    """
    headers = tensor_headers(folder)
    if not headers:
        return None
    spans = [said["data_offsets"] for said in headers.values()]
    return {
        "files": len({said["file"] for said in headers.values()}),
        "tensors": len(headers),
        "numbers": sum(math.prod(said["shape"]) for said in headers.values()),
        "bytes": sum(end - start for start, end in spans),
    }

"""Loading a recurrent checkpoint, from a folder or the hub."""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer

from redepth.errors import RedepthError, first_line, one_line
from redepth.griffin import RecurrentGemmaForCausalLM
from redepth.modeling import RecurrentDepthConfig, RecurrentDepthForCausalLM
from redepth.modeling.published import BUILT_IN_TEXT, check_better_than_chance, complete_config
from redepth.modeling.published_kinds import Kind
from redepth.modeling.quantizer import DepthQuantizationConfig
from redepth.runtime import choose_device, parse_dtype

from .checked import load_checked
from .folder import CONFIG_FILE, CheckpointFolder
from .recorded import find_folder
from .sources import TOKENIZER_FILES

MODEL_CLASSES: dict[str, Any] = {
    "huginn_raven": RecurrentDepthForCausalLM,
    "recurrent_gemma": RecurrentGemmaForCausalLM,
}


def load(
    name: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    device_map: Any = None,
    quantization: Any = None,
    attn_implementation: str | None = None,
    few_token_kernels: bool = False,
) -> RecurrentDepthForCausalLM | RecurrentGemmaForCausalLM:
    """A model recurrent in depth (`huginn_raven`) or in time (`recurrent_gemma`), in eval mode.

    No code that comes with the checkpoint is run: redepth's own takes its place.

    Args:
        name: folder or hub id.
        dtype: `auto` (as saved), a torch dtype or its name.
        device: where to put it; `auto` takes a GPU where there is one.
        revision: branch, tag or commit of a hub repository.
        device_map: as transformers takes it, to spread the model; `device` is left aside then.
        quantization: quantise the layers as they are loaded: `int8` (products in 8 bits), `int8-weight-only` or `int4`, in
            the core; a `DepthQuantizationConfig`; or another of transformers' own configurations. A checkpoint that is
            stored quantised needs none.
        attn_implementation: `sdpa`, `eager`, …; transformers' choice by default.
        few_token_kernels: decode by compiled kernels where they know the model: `model.use_few_token_kernels()`.

    Raises:
        RedepthError: where there is no such checkpoint, it is of another kind, its weights don't fit or are not numbers,
            or there is no such device.
    """
    if isinstance(dtype, str) and dtype != "auto":
        dtype = parse_dtype(dtype)
    chosen = choose_device(device)
    if isinstance(quantization, str):
        quantization = DepthQuantizationConfig.named(quantization)
    model_class = MODEL_CLASSES[_model_type(name, tuple(MODEL_CLASSES), revision)]
    options = {
        "revision": revision,
        "device_map": device_map,
        "quantization_config": quantization,
        "attn_implementation": attn_implementation,
    }
    if quantization is not None and device_map is None and not isinstance(quantization, DepthQuantizationConfig):
        options["device_map"] = {"": chosen}  # quantised weights are made where they stay
    given = {key: value for key, value in options.items() if value is not None}
    model = load_checked(model_class, name, f"checkpoint {str(name)!r}", dtype, **given)
    model = model if "device_map" in given else model.to(chosen)
    kind = getattr(model, "published_kind", None)
    if kind is not None and kind.is_inferred:
        check_inferred(name, model)
    if few_token_kernels and hasattr(model, "use_few_token_kernels"):
        model.use_few_token_kernels()
    return model


def check_inferred(name: str | Path, model: Any) -> None:
    """Refuse a published checkpoint whose blocks' switches were inferred, and wrongly."""
    ids = load_tokenizer(name)(BUILT_IN_TEXT, return_tensors="pt")["input_ids"].to(model.device)
    try:
        check_better_than_chance(model, ids)
    except ValueError as error:
        raise RedepthError(f"checkpoint {str(name)!r}: {error}") from None


def read_config(name: str | Path, revision: str | None = None) -> tuple[RecurrentDepthConfig, Kind | None]:
    """A checkpoint's configuration, complete, and its published kind (None for redepth's own).

    Raises:
        RedepthError: where there is no such checkpoint, or it fits no kind.
    """
    _model_type(name, (RecurrentDepthConfig.model_type,), revision)
    where: Any = {"revision": revision} if revision is not None else {}
    try:
        config = RecurrentDepthConfig.from_pretrained(name, **where)
        return config, complete_config(config, name, **where)
    except (OSError, ValueError, TypeError, SafetensorError, StrictDataclassError) as error:
        raise RedepthError(f"checkpoint {str(name)!r}: {one_line(error)}") from None


def is_recurrent(checkpoint: str | Path) -> bool:
    """Whether a checkpoint has a loop in depth.

    Raises:
        RedepthError: where there is none that can be read.
    """
    return _recorded_type(checkpoint) == RecurrentDepthConfig.model_type


def local_checkpoint(name: str | Path) -> Path:
    """The folder of a checkpoint that is to be written into.

    Raises:
        RedepthError: for a hub id, and for a folder that is not there or holds no checkpoint.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        CheckpointFolder(folder).settle()
        if (folder / CONFIG_FILE).is_file():
            return folder
        raise RedepthError(f"{str(name)!r} has no config.json; give a folder made by redepth convert")
    text = str(name)
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        raise RedepthError(
            f"{text!r} is no local folder, and a hub repository can't be written into; fetch it first: redepth convert "
            f"{text} {text.partition('/')[2]}"
        )
    raise RedepthError(f"checkpoint {text!r} does not exist; make one with redepth convert")


def check_unquantized(name: str | Path, config: Any, verb: str) -> None:
    """Refuse a checkpoint whose weights are stored quantised.

    Args:
        verb: what can't be done with it, such as `be healed`.

    Raises:
        RedepthError: for such a checkpoint.
    """
    if getattr(config, "quantization_config", None) is not None:
        raise RedepthError(
            f"checkpoint {str(name)!r} is quantised and can't {verb}; start from the one that it was made from"
        )


def load_tokenizer(name: str | Path, revision: str | None = None) -> Any:
    """The tokenizer beside a checkpoint.

    Raises:
        RedepthError: where there is none.
    """
    folder = Path(name).expanduser()
    if folder.is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
        raise RedepthError(
            f"checkpoint {str(name)!r} has no tokenizer; put tokenizer.json and tokenizer_config.json beside its config.json"
        )
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # tokenizers written in Rust raise nothing more special
        raise RedepthError(f"checkpoint {str(name)!r} has no usable tokenizer: {first_line(error)}") from None


def _recorded_type(name: str | Path, revision: str | None = None) -> Any:
    """The `model_type` that a configuration records."""
    try:
        values, _ = RecurrentDepthConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError) as error:
        raise RedepthError(f"checkpoint {str(name)!r} has no readable configuration: {first_line(error)}") from None
    return values.get("model_type") if isinstance(values, dict) else None


def _model_type(name: str | Path, known: tuple[str, ...], revision: str | None = None) -> str:
    folder = find_folder(name)
    model_type = _recorded_type(folder if folder is not None else str(name), revision)
    if model_type not in known:
        raise RedepthError(
            f"{str(name)!r} is a {model_type!r} checkpoint, not a recurrent one; convert it with redepth convert first"
        )
    return model_type

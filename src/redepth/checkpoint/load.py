"""Loading a recurrent checkpoint, from a folder or the hub."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer

from redepth.errors import RedepthError, first_line
from redepth.griffin import RecurrentGemmaForCausalLM
from redepth.modeling import RecurrentDepthConfig, RecurrentDepthForCausalLM
from redepth.modeling.published import Kind, complete_config
from redepth.runtime import parse_dtype

from .folder import CheckpointFolder

MODEL_CLASSES: dict[str, Any] = {
    "huginn_raven": RecurrentDepthForCausalLM,
    "recurrent_gemma": RecurrentGemmaForCausalLM,
}


def load(
    name: str | Path, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> RecurrentDepthForCausalLM | RecurrentGemmaForCausalLM:
    """A model recurrent in depth (`huginn_raven`) or in time (`recurrent_gemma`), in eval mode.

    Args:
        name: folder or hub id.
        dtype: `auto` (as saved), a torch dtype or its name.
        device: where to put it.

    Raises:
        RedepthError: where there is no such checkpoint, it is of another kind, or its weights don't fit.
    """
    if isinstance(dtype, str) and dtype != "auto":
        dtype = parse_dtype(dtype)
    model_class = MODEL_CLASSES[_model_type(name, tuple(MODEL_CLASSES))]
    try:
        loaded: Any = model_class.from_pretrained(name, dtype=dtype, output_loading_info=True)
    except (OSError, SafetensorError) as error:
        raise RedepthError(f"checkpoint {str(name)!r} can't be read, perhaps cut short: {first_line(error)}") from None
    model, report = loaded
    for problem, said in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has no place for"),
        ("mismatched_keys", "has the wrong shape of"),
    ):
        if report[problem]:
            raise RedepthError(f"checkpoint {str(name)!r} {said} tensor {min(report[problem])!r}")
    return model.to(device).eval()


def read_config(name: str | Path) -> tuple[RecurrentDepthConfig, Kind | None]:
    """A checkpoint's configuration, complete, and its published kind (None for redepth's own).

    Raises:
        RedepthError: where there is no such checkpoint, or it fits no kind.
    """
    _model_type(name, (RecurrentDepthConfig.model_type,))
    try:
        config = RecurrentDepthConfig.from_pretrained(name)
        return config, complete_config(config, name)
    except (OSError, ValueError, SafetensorError) as error:
        raise RedepthError(f"checkpoint {str(name)!r}: {first_line(error)}") from None


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer beside a checkpoint.

    Raises:
        RedepthError: where there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RedepthError(f"checkpoint {str(name)!r} has no usable tokenizer: {first_line(error)}") from None


def _model_type(name: str | Path, known: tuple[str, ...]) -> str:
    text = str(name)
    folder = Path(text).expanduser()
    if folder.is_dir():
        CheckpointFolder(folder).settle()
    if folder.exists() and not (folder / "config.json").is_file():
        raise RedepthError(f"{text!r} has no config.json; give a folder made by redepth convert")
    if not folder.exists() and (text.startswith((".", "/", "~")) or text.count("/") != 1):
        raise RedepthError(f"checkpoint {text!r} does not exist; make one with redepth convert")
    try:
        values, _ = RecurrentDepthConfig.get_config_dict(folder if folder.exists() else text)
    except (OSError, ValueError) as error:
        raise RedepthError(f"checkpoint {text!r} has no readable configuration: {first_line(error)}") from None
    model_type = values.get("model_type")
    if model_type not in known:
        raise RedepthError(
            f"{text!r} is a {model_type!r} checkpoint, not a recurrent one; convert it with redepth convert first"
        )
    return model_type

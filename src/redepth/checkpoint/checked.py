"""Loading weights for every verb alike: a tensor that is missing, misshapen, unexpected or not finite is refused."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from redepth.errors import RedepthError, first_line

from .shards import find_tensors


def load_checked(
    model_class: Any, name: str | Path, said: str, dtype: str | torch.dtype = torch.float32, **options: Any
) -> Any:
    """`model_class.from_pretrained(name, …)` in eval mode, where every weight comes from the checkpoint.

    Args:
        name: folder or hub id.
        said: how an error names it, such as `checkpoint 'out'`.

    Raises:
        RedepthError: naming the tensor, or saying that a file can't be read.
    """
    if Path(name).is_dir():
        find_tensors(Path(name))  # an index that leads out of the folder is not followed
    try:
        loaded: Any = model_class.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except (OSError, SafetensorError) as error:
        raise RedepthError(f"{said} can't be read, perhaps cut short: {first_line(error)}") from None
    model, report = loaded
    for problem, verb in (
        ("missing_keys", "lacks"),
        ("unexpected_keys", "has no place for"),
        ("mismatched_keys", "has the wrong shape of"),
    ):
        if report[problem]:
            first = min(report[problem])
            tensor = first if isinstance(first, str) else first[0]
            raise RedepthError(f"{said} {verb} tensor {tensor!r}; is it whole?")
    check_finite(model, said)
    return model.eval()


def check_finite(model: torch.nn.Module, said: str) -> None:
    """Refuse weights that are not numbers, by one sum over each tensor; those that were left on disk are not read.

    Raises:
        RedepthError: naming the first such tensor.
    """
    for tensor_name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta and not parameter.detach().sum().isfinite():
            # A sum may overflow in a narrow dtype though every part of it is finite.
            bad = int((~parameter.isfinite()).sum())
            if bad:
                raise RedepthError(f"{said} has {bad:,} values that are NaN or infinite in tensor {tensor_name!r}")

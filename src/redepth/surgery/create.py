"""A fresh recurrent model, written as a checkpoint."""

from pathlib import Path
from typing import Any

import torch

from redepth.checkpoint.folder import CheckpointFolder
from redepth.modeling import RecurrentDepthConfig, RecurrentDepthForCausalLM


def create(
    config: RecurrentDepthConfig,
    out: str | Path,
    tokenizer: Any | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Draw weights by the published initialisation and write the folder whole.

    Raises:
        RedepthError: if `out` must not be replaced.
    """
    with CheckpointFolder(out).replacing(overwrite) as folder:
        torch.manual_seed(seed)
        standard = torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            model = RecurrentDepthForCausalLM(config)
        finally:
            torch.set_default_dtype(standard)
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(out)

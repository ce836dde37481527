"""Exit heads: what a test of logits would measure, told from the state alone.

A test of logits costs coda and head at every step, often more than the step itself. What it measures is, for small
changes of the state, close to a quadratic form of that change (for KL, the Fisher information); calibration fits one.

Shapes: N tokens, D width, K directions.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from .errors import UserError
from .exits import ExitTest


@dataclass(frozen=True)
class ExitHead:
    """Σ w_k (d_k·δ)² + w_rest (‖δ‖² − Σ (d_k·δ)²) with δ = (s_i − s_{i−1}) / ‖s_i‖: a measure of an `ExitTest`.

    Attributes:
        directions: d, orthonormal, fp32 `[K, D]`.
        weights: w, fp32 `[K + 1]`, that of the rest last.
    """

    directions: torch.Tensor
    weights: torch.Tensor

    def __call__(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """States after this step and the one before, fp32 `[N, D]` → `[N]`."""
        return features(new, old, self.directions.to(new.device)) @ self.weights.to(new.device)


def features(new: torch.Tensor, old: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """(d_k·δ)² and what is left of ‖δ‖², `[N, K + 1]`."""
    change = (new - old) / new.norm(dim=-1, keepdim=True)
    along = (change @ directions.T).square()
    rest = (change.square().sum(-1, keepdim=True) - along.sum(-1, keepdim=True)).clamp(min=0)
    return torch.cat([along, rest], dim=-1)


def to_text(directions: torch.Tensor) -> str:
    """Directions as a config stores them: fp16, in hexadecimal."""
    return directions.half().cpu().contiguous().view(torch.uint8).numpy().tobytes().hex()


@lru_cache
def from_text(text: str, width: int) -> torch.Tensor:
    """What `to_text` wrote, fp32 `[K, D]`.

    Raises:
        ValueError: for what it did not write.
    """
    try:
        values = torch.frombuffer(bytearray.fromhex(text), dtype=torch.float16)
        return values.float().unflatten(0, (-1, width))
    except (TypeError, ValueError, RuntimeError):
        raise UserError("depth_profile has exit_heads that are damaged; calibrate again") from None


def calibrated_head(profile: dict[str, Any], test: ExitTest, label: str, width: int) -> tuple[ExitTest, float] | None:
    """The exit head in place of a test of logits, and its threshold for a wanted agreement; None where there is none.

    Args:
        profile: a config's `depth_profile`.
        label: such as `99%`.
        width: D.
    """
    heads = profile.get("exit_heads")
    found = heads["tests"].get(test.name) if heads is not None and test.of_logits else None
    if heads is None or found is None or found["thresholds"].get(label) is None:
        return None
    head = ExitHead(from_text(heads["directions"], width), torch.tensor(found["weights"]))
    return replace(test, of_logits=False, measure=head, streak=1, remembers=None), found["thresholds"][label]

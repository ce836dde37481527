"""Linear layers over a few rows on a processor: oneDNN's products with weights that are laid out for it once.

torch's own product lays a weight out anew in every call, which for 2 to 16 rows costs as much as the product itself.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

ROWS = 16  # for how many the layout is chosen; others work too


def packed_forward(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's `forward`, with a copy of its weight laid out for it."""
    weight: Any = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
    multiply: Any = torch.ops.mkldnn._linear_pointwise

    def forward(x: torch.Tensor) -> torch.Tensor:
        return multiply(x, weight, linear.bias, "none", [], "")

    return forward


class PackedLinears:
    """The linear layers of a model, packed; nothing where its processor or dtype gains nothing.

    Args:
        model: whose weights do not change from now on. They are held twice.
    """

    def __init__(self, model: nn.Module) -> None:
        linears = [module for module in model.modules() if type(module) is nn.Linear]
        gains = torch.backends.mkldnn.is_available() and all(
            linear.weight.device.type == "cpu" and linear.weight.dtype == torch.float32 for linear in linears
        )
        self.forwards = [(linear, packed_forward(linear)) for linear in linears] if gains else []

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While it lasts, the model multiplies with the packed weights."""
        for linear, forward in self.forwards:
            linear.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            for linear, _ in self.forwards:
                del linear.forward

"""One pass of the core over new tokens that continue a cache, compiled into few kernels by torch.compile.

The layers are those of the plain pass; the cache is handed to them as plain tensors, so that one graph serves every step
and every length of the text.
"""

from typing import Any

import torch
from transformers.utils import logging

from .passes import PassContext
from .quantized_linear import QuantizedLinear
from .tokens import TokenSubset

logger = logging.get_logger(__name__)

# Keys and values of one layer at one step, [B, kv_heads, S, K], the new tokens' places included.
Stored = tuple[torch.Tensor, torch.Tensor]


class OpenStep:
    """Stands in for the cache within a compiled pass: what one step of the core reads and writes.

    Args:
        stored: by layer.
        places: `[T]`, where the new tokens go.
    """

    def __init__(self, stored: dict[int, Stored], places: torch.Tensor) -> None:
        self.stored = stored
        self.places = places

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        step: int,
        subset: TokenSubset | None,
    ) -> Stored:
        """As `RecurrentDepthCache.update`."""
        keys, values = self.stored[layer_idx]
        keys.index_copy_(2, self.places, key_states)
        values.index_copy_(2, self.places, value_states)
        return keys, values


def core_pass(
    stack: Any,
    embedded: torch.Tensor,
    state: torch.Tensor,
    stored: dict[int, Stored],
    places: torch.Tensor,
    masks: dict[str, Any],
    rotations: dict[str, tuple[torch.Tensor, torch.Tensor]],
    attention: str,
) -> torch.Tensor:
    """s_{i−1} `[B, T, D]` in, s_i out; writes the new tokens' keys and values into `stored`."""
    context = PassContext(masks, rotations, OpenStep(stored, places), places[None], attention)
    x = stack.adapter(torch.cat([state, embedded], dim=-1))
    for layer in stack.core_block:
        x = layer(x, context, 1)
    return x


# A wrapper in C++ calls the kernels: Python in between costs up to a tenth of a pass, its code being out of the caches each time.
compiled_core_pass = torch.compile(core_pass, dynamic=True, options={"cpp_wrapper": True})


def step_compiled(
    stack: Any, embedded: torch.Tensor, state: torch.Tensor, context: PassContext, step: int
) -> torch.Tensor | None:
    """One step of the core, `[B, T, D]`, by the compiled pass; None where it is not of the kind that is compiled.

    That is one new token a row, on top of a cache that holds its earlier ones, and nobody who watches.
    """
    cache = context.cache
    ordinary = context.subset is None and context.reading is None and not context.watchers
    if cache is None or not ordinary or state.shape[1] != 1 or torch.is_grad_enabled():
        return None
    first = stack.config.n_layers_in_prelude
    stored = cache.open_step(range(first, first + len(stack.core_block)), step, 1)
    if stored is None:
        return None
    # Two arguments in the same memory would be a graph of its own.
    state = state.clone() if state is embedded else state
    return compiled_core_pass(
        stack, embedded, state, stored, context.new_places(), context.masks, context.rotations, context.attention
    )


def compiler_works(device: torch.device, core: torch.nn.Module) -> bool:
    """Whether torch.compile can make code for a core on a device; where it can't, one line says why."""
    if any(isinstance(module, QuantizedLinear) for module in core.modules()):
        logger.warning(
            "the core is not compiled, and runs as before: its layers are quantised, with kernels of their own"
        )
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(3, device=device))
    except Exception as error:
        logger.warning(
            f"the core is not compiled, and runs as before: torch.compile failed here ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0]}); install a C++ compiler such as g++"
        )
        return False
    return True

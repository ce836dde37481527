"""Attention of one pass over tokens of many rows, each of which reads its own blocks of the pool.

Shapes: N tokens of the pass, R rows, n tokens of each, L layers, S = blocks · BLOCK keys, H query heads, G key/value heads,
K head_dim.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from redepth.modeling import RecurrentDepthConfig
from redepth.modeling.attention import eager_attention
from redepth.modeling.passes import PassContext
from redepth.modeling.rotary import rotations

from .pool import BLOCK, Pool, Table


@dataclass
class Part:
    """The tokens of one row in a pass.

    Attributes:
        table: the row's blocks.
        places: `[n]`, where in the row's text they are, in order.
        last: the last of them.
        plane: the first plane of the pass's layers.
        visible: `[tokens]`, bool, which of the row's tokens show themselves; None for all.
    """

    table: Table
    places: torch.Tensor
    last: int
    plane: int
    visible: torch.Tensor | None = None


class Group:
    """Rows with the same number of tokens in a pass, which attend in one call."""

    def __init__(self, parts: list[Part], layers: int, config: RecurrentDepthConfig) -> None:
        self.rows, self.tokens = len(parts), len(parts[0].places)
        width = max(part.last for part in parts) // BLOCK + 1
        device = parts[0].places.device
        ids = torch.zeros(layers, self.rows, width, dtype=torch.long, device=device)
        for row, part in enumerate(parts):
            own = part.table.ids[part.plane : part.plane + layers, :width]
            ids[:, row, : own.shape[1]] = own
        places = torch.stack([part.places for part in parts])
        self.places = places.flatten()
        blocks = ids.gather(2, (places // BLOCK).expand(layers, -1, -1))
        # Where the new tokens' keys and values go, [L, R · n].
        self.entries = (blocks * BLOCK + places % BLOCK).flatten(1)
        self.blocks = ids.flatten(1)  # [L, R · blocks]
        keys = torch.arange(width * BLOCK, device=device)
        masks = {"full_attention": keys <= places[..., None]}
        if any(part.visible is not None for part in parts):
            seen = masks["full_attention"].new_ones(self.rows, len(keys))
            for row, part in enumerate(parts):
                if part.visible is not None:
                    seen[row] = F.pad(part.visible, (0, max(0, len(keys) - len(part.visible))))[: len(keys)]
            masks["full_attention"] = masks["full_attention"] & seen[:, None]
        if config.sliding_window:
            in_window = keys > places[..., None] - config.sliding_window
            masks["sliding_attention"] = masks["full_attention"] & in_window
        # A group of query heads stands beside the tokens: [R, 1, heads of a group · n, S].
        per_group = 1 if self.tokens == 1 else config.n_heads // (config.num_key_value_heads or config.n_heads)
        self.masks = {kind: mask.repeat(1, per_group, 1)[:, None] for kind, mask in masks.items()}


class PagedAttention:
    """What takes attention's place in the layers of one pass, see `PassContext.attend`.

    Args:
        pool: of keys and values.
        parts: the rows, those of one token first.
        layers: how many the pass has.
        first_layer: the first of them, counted through prelude, core and coda.
    """

    def __init__(
        self, config: RecurrentDepthConfig, pool: Pool, parts: list[Part], layers: int, first_layer: int
    ) -> None:
        self.pool, self.first_layer = pool, first_layer
        singles = [part for part in parts if len(part.places) == 1]
        together = [singles] if singles else []
        self.groups = [Group(rows, layers, config) for rows in (*together, *([part] for part in parts[len(singles) :]))]
        self.places = torch.cat([group.places for group in self.groups])
        self.entries = torch.cat([group.entries for group in self.groups], dim=1)

    def __call__(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """q `[1, H, N, K]`, k and v `[1, G, N, K]` → `[1, N, H, K]`."""
        layer = module.layer_idx - self.first_layer
        for stored, new in ((self.pool.keys, key), (self.pool.values, value)):
            stored.flatten(0, 1).index_copy_(0, self.entries[layer], new[0].transpose(0, 1).to(stored.dtype))
        mixed, start = [], 0
        for group in self.groups:
            end = start + group.rows * group.tokens
            mixed.append(self._attend(module, query[0, :, start:end], group, layer))
            start = end
        return torch.cat(mixed)[None]

    def _attend(self, module: Any, query: torch.Tensor, group: Group, layer: int) -> torch.Tensor:
        """q `[H, R · n, K]` → `[R · n, H, K]`."""
        keys, values = (
            part.index_select(0, group.blocks[layer]).view(group.rows, -1, *part.shape[2:]).transpose(1, 2)
            for part in (self.pool.keys, self.pool.values)
        )
        heads, head_dim = keys.shape[1], keys.shape[3]
        shape = heads, -1, group.rows, group.tokens, head_dim
        query = query.view(shape).permute(2, 0, 1, 3, 4).reshape(group.rows, heads, -1, head_dim)
        mask = group.masks[module.layer_type]
        if module.soft_cap is not None:
            mixed = eager_attention(module, query, keys, values, mask, module.scaling, softcap=module.soft_cap)[0]
            mixed = mixed.transpose(1, 2)
        else:
            mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=module.scaling)
        mixed = mixed.reshape(group.rows, heads, -1, group.tokens, head_dim)
        return mixed.permute(0, 3, 1, 2, 4).reshape(group.rows * group.tokens, -1, head_dim)


def paged_context(
    config: RecurrentDepthConfig,
    pool: Pool,
    parts: list[Part],
    layers: int,
    first_layer: int,
    continued: torch.Tensor | None = None,
) -> PassContext:
    """The context of a pass over the tokens of `parts`, as one row `[1, N]`; arguments as `PagedAttention`.

    Args:
        continued: `[1, N]`, which tokens are past the first step or began from a state carried over.
    """
    attend = PagedAttention(config, pool, parts, layers, first_layer)
    positions = attend.places[None]
    kinds = set(config.layer_types or ["full_attention"])
    return PassContext(
        masks={},
        rotations={kind: rotations(config, positions, kind) for kind in kinds},
        cache=None,
        position_ids=positions,
        attention="paged",
        continued=False if continued is None else continued,
        attend=attend,
    )

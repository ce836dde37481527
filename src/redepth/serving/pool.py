"""Room for keys and values: blocks of one pool, which rows take as they grow and give back when they end.

A block holds `BLOCK` tokens of one layer at one *place* (where a cache rule keeps a step; prelude and coda have one). A
row's *planes* are the layers at their places, in this order: prelude, coda, then the core's layers at place 1, 2, …
"""

import torch

from redepth.modeling import DepthPolicy, RecurrentDepthConfig

BLOCK = 16  # tokens


class Planes:
    """Where a model's layers lie among the planes of a row."""

    def __init__(self, config: RecurrentDepthConfig) -> None:
        self.prelude = config.n_layers_in_prelude
        self.core = config.n_layers_in_recurrent_block
        self.coda = config.n_layers_in_coda

    def of_core(self, place: int) -> int:
        """The first plane of the core at a place, counted from 1; one more than the last place gives the end."""
        return self.prelude + self.coda + (place - 1) * self.core

    def count(self, policy: DepthPolicy) -> int:
        """How many planes a row of this policy has."""
        return self.of_core(policy.cache_rule.places(policy.num_steps) + 1)


class Pool:
    """Blocks of keys and values, `[blocks, BLOCK, kv_heads, head_dim]` each.

    Rows are promised at the start all that they can come to need, so that none is ever stopped halfway for want of
    room, and take it block by block.

    Args:
        config: of the model.
        blocks: how many there are.
    """

    def __init__(self, config: RecurrentDepthConfig, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        assert config.num_key_value_heads is not None and config.head_dim is not None
        self.blocks = blocks
        self.promised = 0
        # Block 0 is nobody's: it holds zeros, and stands where a row has no block.
        self._free = list(range(blocks, 0, -1))
        shape = blocks + 1, BLOCK, config.num_key_value_heads, config.head_dim
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    @property
    def used(self) -> int:
        """Blocks that rows hold."""
        return self.blocks - len(self._free)

    def promise(self, blocks: int) -> bool:
        """Set room aside; False where that much is not left."""
        if self.promised + blocks > self.blocks:
            return False
        self.promised += blocks
        return True

    def take(self, blocks: int) -> torch.Tensor:
        """The ids of blocks, `[blocks]`, of what was promised; empty, since what is masked must still be a number."""
        taken = torch.tensor([self._free.pop() for _ in range(blocks)], device=self.keys.device)
        self.keys[taken] = 0
        self.values[taken] = 0
        return taken

    def give_back(self, taken: torch.Tensor, promised: int) -> None:
        """End a row: its blocks, and the promise they were part of."""
        self._free += taken.tolist()
        self.promised -= promised

    def copy_tokens(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy entries, by their flat indices: `source` `[L, N]` to each of `target` `[C, L, N]`."""
        for part in (self.keys, self.values):
            flat = part.flatten(0, 1)
            flat[target.flatten()] = flat[source].expand(len(target), *source.shape, *flat.shape[1:]).flatten(0, 2)


class Table:
    """The blocks of one row: which of the pool's blocks holds which tokens of a plane, `[planes, blocks of a plane]`.

    Args:
        pool: that it takes blocks from.
        planes: of the row.
        capacity: the most tokens that it can come to.
    """

    def __init__(self, pool: Pool, planes: int, capacity: int) -> None:
        self.pool = pool
        self.promised = needed_blocks(planes, capacity)
        self.ids = torch.zeros(planes, -(-capacity // BLOCK), dtype=torch.long, device=pool.keys.device)
        self.width = 0

    def reach(self, tokens: int) -> None:
        """Have blocks for so many tokens."""
        width = -(-tokens // BLOCK)
        if width > self.width:
            planes = len(self.ids)
            self.ids[:, self.width : width] = self.pool.take(planes * (width - self.width)).view(planes, -1)
            self.width = width

    def entries(self, first: int, last: int, places: torch.Tensor) -> torch.Tensor:
        """Flat indices in the pool of tokens `places` `[N]` in planes `first` to `last` (excluded), `[planes, N]`."""
        return self.ids[first:last, places // BLOCK] * BLOCK + places % BLOCK

    def give_back(self) -> None:
        self.pool.give_back(self.ids[:, : self.width].flatten(), self.promised)
        self.width = 0


def needed_blocks(planes: int, tokens: int) -> int:
    """Blocks for so many tokens in so many planes."""
    return planes * -(-tokens // BLOCK)

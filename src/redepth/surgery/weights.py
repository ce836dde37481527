"""The weight table of one conversion, read in both directions: source → recurrent and back."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from redepth.checkpoint.shards import HEAD
from redepth.errors import RedepthError
from redepth.modeling import RecurrentDepthConfig
from redepth.modeling.fields import GROUP_MODULES
from redepth.modeling.state import gate_start

from .families import Family
from .plan import Plan

ADAPTER = "transformer.adapter.weight"
STATE_GATE = "transformer.state_gate.weight"


@dataclass(frozen=True)
class Entry:
    """One recurrent tensor and the source tensors stacked in it, with the rows that each gives."""

    target: str
    sources: tuple[str, ...]
    rows: tuple[int, ...] | None = None  # None where one source tensor is the whole

    def fuse(self, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
        if self.rows is None:
            return read(self.sources[0])
        parts = [read(name) for name in self.sources]
        for name, part, rows in zip(self.sources, parts, self.rows, strict=True):
            if part.shape[0] != rows:
                raise RedepthError(f"tensor {name!r} has {part.shape[0]} rows, but its config implies {rows}")
            if part.shape[1:] != parts[0].shape[1:]:
                raise RedepthError(
                    f"tensor {name!r} has the shape {list(part.shape)}, which does not fit its neighbours'"
                )
        return torch.cat(parts)

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.rows is None:
            return {self.sources[0]: tensor}
        return dict(zip(self.sources, tensor.split(list(self.rows)), strict=True))


def _rows(target: str, config: RecurrentDepthConfig) -> tuple[int, ...] | None:
    assert config.head_dim is not None and config.num_key_value_heads is not None
    if target.startswith("attn.Wqkv"):
        keys = config.num_key_value_heads * config.head_dim
        return config.n_heads * config.head_dim, keys, keys
    if target.startswith("mlp.fc."):
        return config.intermediate_size, config.intermediate_size
    return None


def weight_table(family: Family, plan: Plan, config: RecurrentDepthConfig) -> list[Entry]:
    """Every recurrent tensor but the adapter and the state's gate, in the order in which a checkpoint holds them."""
    table, position_in_model = [], 0
    for target, source in family.outer.items():
        if not (target == HEAD and config.tie_embeddings):
            table.append(Entry(target, (source,)))
    for group, module in GROUP_MODULES.items():
        for position, layer in enumerate(getattr(plan, group)):
            for target, names in family.layer_sources(config.layer_type(position_in_model)).items():
                sources = tuple(f"{family.layer_prefix}.{layer}.{name}" for name in names)
                table.append(Entry(f"transformer.{module}.{position}.{target}", sources, _rows(target, config)))
            position_in_model += 1
    return table


def check_names(family: Family, plan: Plan, table: list[Entry], names: list[str]) -> None:
    """Every tensor that the table needs is there, and every tensor that is there is needed, dropped or known.

    Raises:
        RedepthError: naming the tensor.
    """
    present, needed = set(names), {source for entry in table for source in entry.sources}
    for name in sorted(needed - present):
        raise RedepthError(f"the source lacks tensor {name!r}, which family {family.name} has; is it another family?")
    dropped = {
        f"{family.layer_prefix}.{layer}.{name}"
        for layer in plan.dropped
        for names_in_layer in family.layer_sources().values()
        for name in names_in_layer
    }
    tied_head = {family.outer[HEAD]}  # checked against the embedding where the conversion ties them
    for name in sorted(present - needed - dropped - tied_head):
        if not any(name.endswith(ending) for ending in family.ignored):
            raise RedepthError(
                f"the source holds tensor {name!r}, which family {family.name} has no place for; nothing is dropped"
            )


def adapter_weight(
    adapter: str, width: int, dtype: torch.dtype, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The adapter's start, `[D, 2 D]` on `[state; e]`, in fp32.

    `inject` is `[0 | I]`; `blend:α` is `[α I | (1 − α) I]`, with the nearest α for which α and 1 − α are exact in
    `dtype`, so that they add up to one there; `gate:α` is the same, beside a gate on the state; `random` is a normal cut at ±3 std with std √(2/(5 D)).
    """
    kind, alpha = parse_adapter(adapter)
    identity = torch.eye(width)
    if kind == "inject":
        return torch.cat([torch.zeros(width, width), identity], dim=1)
    if kind in ("blend", "gate"):
        spacing = torch.finfo(dtype).eps / 2  # of the dtype's numbers from 1/2 to 1
        most = round(1 / spacing) - (alpha < 1)
        alpha = min(max(round(alpha / spacing), 1), most) * spacing
        return torch.cat([alpha * identity, (1 - alpha) * identity], dim=1)
    std = (2 / (5 * width)) ** 0.5
    weight = torch.empty(width, 2 * width)
    return torch.nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std, generator=generator)


def parse_adapter(adapter: str) -> tuple[str, float]:
    """(kind, α) of an `--adapter` value; α is 0 where the kind has none.

    Raises:
        RedepthError: for an unknown kind or an α outside (0, 1].
    """
    if adapter in ("inject", "random"):
        return adapter, 0.0
    kind, _, text = adapter.partition(":")
    try:
        alpha = float(text)
    except ValueError:
        alpha = -1.0
    if kind not in ("blend", "gate") or not 0 < alpha <= 1:
        raise RedepthError(f"--adapter {adapter!r} is unknown; use inject, random, blend:α or gate:α, with α in (0, 1]")
    return kind, alpha


def has_gate(adapter: str) -> bool:
    """Whether an `--adapter` value also puts a gate on the state."""
    return parse_adapter(adapter)[0] == "gate"


def new_tensors(
    adapter: str, width: int, dtype: torch.dtype, generator: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """The tensors that no source has, by name, in fp32: the adapter's, and the gate's where there is one."""
    made = {ADAPTER: adapter_weight(adapter, width, dtype, generator)}
    return made | ({STATE_GATE: gate_start(width)} if has_gate(adapter) else {})


def to_recurrent(
    table: list[Entry], read: Callable[[str], torch.Tensor], made: dict[str, torch.Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The recurrent tensors, those of `new_tensors` first, one at a time, each read when it is asked for."""
    for name, tensor in made.items():
        yield name, tensor.to(dtype)
    for entry in table:
        yield entry.target, entry.fuse(read).to(dtype).contiguous()


def to_source(table: list[Entry], read: Callable[[str], torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same table backwards: the source's tensors from a recurrent checkpoint, without those that are new."""
    for entry in table:
        yield from entry.split(read(entry.target)).items()

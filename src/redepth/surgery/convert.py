"""The surgery: source checkpoint in, recurrent checkpoint out, no training."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from redepth.checkpoint.card import write_card
from redepth.checkpoint.cost import ParameterCount, count_parameters
from redepth.checkpoint.folder import DEFAULT_SHARD_SIZE, FAMILY_FILE, CheckpointFolder, write_recipe
from redepth.checkpoint.shards import EMBEDDING, HEAD, save_definition, write_shards
from redepth.checkpoint.sources import Source, open_source
from redepth.errors import RedepthError
from redepth.modeling import RecurrentDepthConfig, RecurrentDepthForCausalLM
from redepth.runtime import parse_dtype

from .families import Derived, Family, family_of
from .plan import DEFAULT_ADAPTER, DEFAULT_STATE, STATES, Plan, make_plan
from .weights import (
    Entry,
    check_names,
    has_gate,
    new_tensors,
    parse_adapter,
    to_recurrent,
    weight_table,
)

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def recurrent_config(source: Source, family: Family, plan: Plan, **changes: Any) -> RecurrentDepthConfig:
    """The recurrent model's configuration for `plan`, from the source's.

    Raises:
        RedepthError: for a source setting that redepth's block does not have.
    """
    given = source.config
    for key, allowed in family.requires.items():
        if getattr(given, key, None) not in allowed:
            raise RedepthError(
                f"source {source.name!r} has {key}={getattr(given, key, None)!r}, but redepth's {family.name} block "
                f"needs {' or '.join(repr(value) for value in allowed)}"
            )
    values: dict[str, Any] = {}
    for key, rule in family.config.items():
        found = getattr(given, rule.source if isinstance(rule, Derived) else rule, None)
        values[key] = rule.apply(found) if isinstance(rule, Derived) and found is not None else found
    values |= family.switches.model_dump()

    window = values.get("sliding_window")
    layer_types = values.pop("layer_types", None) if family.windows == "by_layer" else None
    if family.windows == "every_layer" and window is not None:
        layer_types = ["sliding_attention"] * plan.num_layers
    kept_types = [layer_types[layer] for layer in plan.layers] if layer_types else []
    unknown = sorted(set(kept_types) - {"full_attention", "sliding_attention", *family.layer_of_type})
    if unknown:
        raise RedepthError(
            f"source {source.name!r} has layers of the type {unknown[0]!r}, which family {family.name} does not have"
        )
    if set(kept_types) - {"full_attention"}:
        values["layer_types"] = kept_types
    if "sliding_attention" not in kept_types:
        values["sliding_window"] = None
    if family.max_tokens is not None:
        values["block_size"] = family.max_tokens
    if values.get("rope_layers"):
        values["rope_layers"] = [values["rope_layers"][layer] for layer in plan.layers]

    rope = given.rope_parameters
    nested = {kind: part for kind, part in rope.items() if isinstance(part, dict)}
    for part in nested.values() or [rope]:
        partial = part.get("partial_rotary_factor", 1.0) != 1.0
        if part.get("rope_type") not in ROPE_TYPES or (partial and part["rope_type"] != "default"):
            raise RedepthError(f"source {source.name!r} has rope {part}, but redepth has only {', '.join(ROPE_TYPES)}")
    kinds = set(kept_types) or {"full_attention"}
    values["rope_parameters"] = {kind: dict(nested[kind]) for kind in kinds} if nested else dict(rope)

    return RecurrentDepthConfig(
        **values
        | {
            "n_layers_in_prelude": len(plan.prelude),
            "n_layers_in_recurrent_block": len(plan.core),
            "n_layers_in_coda": len(plan.coda),
            # A conversion knows the depth of its source, one pass through every layer; healing raises it.
            "mean_recurrence": 1,
            "rope_style": "half",
            "qk_bias": False,
            "norm_before_coda": False,
            "state_scale": 1.0,
            "init_values": {"embed_scale": family.embed_factor(values["n_embd"])},
            "bos_token_id": given.bos_token_id,
            "eos_token_id": given.eos_token_id,
            "pad_token_id": given.pad_token_id,
        }
        | changes
    )


@dataclass(frozen=True)
class Conversion:
    """One surgery, decided but not yet carried out.

    Attributes:
        adapter: `inject`, `blend:α`, `gate:α` or `random`.
        dtype: of the recurrent tensors.
        seed: of a random adapter.
    """

    source: Source
    family: Family
    plan: Plan
    config: RecurrentDepthConfig
    adapter: str
    dtype: torch.dtype
    seed: int = 0
    table: list[Entry] = field(default_factory=list, repr=False)

    def with_plan(self, plan: Plan, dtype: torch.dtype | None = None) -> "Conversion":
        """The same surgery with another plan, by the same code path."""
        config = recurrent_config(
            self.source,
            self.family,
            plan,
            initial_state_mode=self.config.initial_state_mode,
            state_gate=has_gate(self.adapter),
            tie_embeddings=self.config.tie_embeddings,
        )
        table = weight_table(self.family, plan, config)
        return replace(self, plan=plan, config=config, table=table, dtype=dtype or self.dtype)

    @property
    def starts_equal(self) -> bool:
        """Whether a full cover with this start equals its source at r = 1."""
        kind, _ = parse_adapter(self.adapter)
        if self.config.initial_state_mode == "skip-adapter":
            return True
        return kind == "inject" or (kind in ("blend", "gate") and self.config.initial_state_mode == "embed")

    @property
    def equal_at_every_depth(self) -> bool:
        return self.adapter == "inject"

    def parameters(self) -> ParameterCount:
        return count_parameters(self.config)

    def _check(self) -> None:
        names = self.source.tensor_names()
        head, embedding = self.family.outer[HEAD], self.family.outer[EMBEDDING]
        if self.config.tie_embeddings and head in names:
            self.source.check_tied(head, embedding)
        check_names(self.family, self.plan, self.table, [*names, head])

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The recurrent tensors, one at a time; no more than one is held here.

        Raises:
            RedepthError: before the first one, if the source's tensors do not fit the family and plan.
        """
        self._check()
        head, names = self.family.outer[HEAD], set(self.source.tensor_names())

        def read(name: str) -> torch.Tensor:
            # An untied copy of a tied source takes its head from the embedding.
            untied = name == head and head not in names
            return self.source.read(self.family.outer[EMBEDDING] if untied else name)

        generator = torch.Generator().manual_seed(self.seed)
        made = new_tensors(self.adapter, self.config.n_embd, self.dtype, generator)
        with torch.device("meta"):
            shapes = {
                name: tensor.shape for name, tensor in RecurrentDepthForCausalLM(self.config).state_dict().items()
            }
        for name, tensor in to_recurrent(self.table, read, made, self.dtype):
            if tensor.shape != shapes[name]:
                raise RedepthError(
                    f"source {self.source.name!r}: {name} would have the shape {list(tensor.shape)}, but the source's config "
                    f"implies {list(shapes[name])}; the two don't belong together"
                )
            yield name, tensor

    def model(self) -> RecurrentDepthForCausalLM:
        """The converted model in memory, in eval mode."""
        with torch.device("meta"):
            model = RecurrentDepthForCausalLM(self.config)
        model.load_state_dict(dict(self.tensors()), strict=False, assign=True)
        model.tie_weights()
        left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if left:
            raise RedepthError(
                f"the conversion gave no tensor {left[0]!r}; this is a bug in the family {self.family.name}"
            )
        return model.eval()

    def recipe(self) -> dict[str, Any]:
        """The recipe that reproduces this checkpoint."""
        return {
            "convert": {
                "source": self.source.recorded_name,
                **({"revision": self.source.commit} if self.source.commit else {}),
                **({"family": str(self.family.file)} if self.family.file else {}),
                **self.plan.slices(),
                "adapter": self.adapter,
                "state": self.config.initial_state_mode,
                "dtype": str(self.dtype).removeprefix("torch."),
                "tie": self.config.tie_embeddings,
                "seed": self.seed,
            },
            "source": {
                "base_model": self.source.base_model,
                "license": self.source.license,
                **({"commit": self.source.commit} if self.source.commit else {}),
            },
            "made_with": {name: version(name) for name in ("redepth", "torch", "transformers")},
        }

    def write(
        self,
        out: Path,
        overwrite: bool = False,
        max_shard_size: str = DEFAULT_SHARD_SIZE,
        on_tensor: Callable[[int, int], None] | None = None,
    ) -> Path:
        """Write the checkpoint folder; nothing is left at `out` if anything fails.

        Args:
            on_tensor: called with (tensors done, tensors in all).

        Raises:
            RedepthError: if `out` must not be replaced, or the source does not fit.
            OSError: if the disk is full or not writable.
        """
        with CheckpointFolder(out).replacing(overwrite, [self.source.location]) as folder:
            write_shards(
                self.tensors(), folder, len(self.table) + 1 + has_gate(self.adapter), max_shard_size, on_tensor
            )
            save_definition(self.config, folder, self.dtype)
            tokenizer = self.source.tokenizer
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            self.source.generation_config().save_pretrained(folder)
            if self.family.file is not None:
                # So that the checkpoint can be verified without the user's file.
                (folder / FAMILY_FILE).write_text(self.family.to_yaml(), encoding="utf-8")
            write_recipe(folder, self.recipe())
            write_card(folder, out.resolve().name)
        return out


def plan_conversion(
    source: str | Path | Source,
    prelude: str | None = None,
    core: str | None = None,
    coda: str | None = None,
    adapter: str = DEFAULT_ADAPTER,
    state: str = DEFAULT_STATE,
    dtype: str | None = None,
    tie: bool | None = None,
    seed: int = 0,
    revision: str | None = None,
    family: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Conversion:
    """Decide a surgery without reading a tensor; see `redepth.convert` for the arguments."""
    if not isinstance(source, Source):
        source = open_source(source, revision, trust_remote_code)
    chosen = family_of(source.config.model_type, family)
    plan = make_plan(source.config.num_hidden_layers, prelude, core, coda)
    if state not in STATES:
        raise RedepthError(f"--state {state!r} is unknown; use {', '.join(STATES)}")
    wanted = parse_dtype(dtype) if dtype is not None else None
    changes: dict[str, Any] = {"initial_state_mode": state, "state_gate": has_gate(adapter)}
    if tie is not None:
        changes["tie_embeddings"] = tie
    config = recurrent_config(source, chosen, plan, **changes)
    return Conversion(
        source=source,
        family=chosen,
        plan=plan,
        config=config,
        adapter=adapter,
        dtype=wanted if wanted is not None else source.dtype,
        seed=seed,
        table=weight_table(chosen, plan, config),
    )

"""What the layers of one forward pass share: masks, rotary angles, positions, the cache and which tokens there are.

Shapes: B batch, T new tokens, S stored and new tokens, D width, K head_dim.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils import is_tracing

from .cache import RecurrentDepthCache
from .configuration import RecurrentDepthConfig
from .errors import UserError
from .fields import LRU_LAYER
from .lru_slots import ReadingOrder, reading_order
from .rotary import rotations
from .tokens import TokenSubset, surely

# Kinds of attention that take a mask of one value for each query and key; flash and flex attention have masks of their own.
WITH_WRITTEN_MASKS = ("sdpa", "eager")

MASK_MAKERS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
}


@dataclass
class PassContext:
    """What every layer of one forward pass shares.

    Attributes:
        masks: by attention type, as the attention implementation takes them.
        rotations: by attention type, cos and sin in fp32, see `rotary.rotations`.
        position_ids: `[B or 1, T]`.
        attention: the kind of attention, as in transformers' `attn_implementation`; see `written_kind`.
        subset: the tokens of this call, where they are not all of the pass.
        steps_run: `[B, T]`, under a criterion: the steps that the tokens have run so far.
        reading: how recurrent layers read the columns of the pass; None where there are none.
        watchers: see `RecurrentStack.watchers`.
        continued: whether the first step starts from a state that was carried over, in place of s_0; or `[B, T]`, which
            tokens' does.
        attend: takes the place of cache and attention: (the `Attention` module, q `[B, H, T, K]`, k and v `[B, G, T, K]` of
            the new tokens) → `[B, T, H, K]`. For callers that keep keys and values themselves.
    """

    masks: dict[str, Any]
    rotations: dict[str, tuple[torch.Tensor, torch.Tensor]]
    cache: Any  # a RecurrentDepthCache, or what stands in for one within a compiled pass
    position_ids: torch.Tensor
    attention: str
    subset: TokenSubset | None = None
    steps_run: torch.Tensor | None = None
    reading: ReadingOrder | None = None
    continued: bool | torch.Tensor = False
    watchers: tuple[Any, ...] = ()
    attend: Callable[..., torch.Tensor] | None = None
    # What the kernels of `few_tokens` share between the layers of a kind.
    calls: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    _places: torch.Tensor | None = field(default=None, init=False, repr=False, compare=False)
    # Copies on other devices, so that a model spread over several moves each context there once.
    _elsewhere: dict[torch.device, "PassContext"] = field(default_factory=dict, init=False, repr=False, compare=False)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "PassContext":
        """The same context with its tensors on `device`; the cache stays, whose slots are where their layers are.

        accelerate calls this where it spreads a model over several devices.
        """
        device = torch.device(device)
        if device == self.position_ids.device:
            return self
        if device not in self._elsewhere:
            kept: dict[str, Any] = {name: getattr(self, name) for name in ("cache", "watchers", "attention")}
            moved: dict[str, Any] = {
                part.name: _moved(getattr(self, part.name), device, non_blocking)
                for part in fields(self)
                if part.init and part.name not in kept
            }
            self._elsewhere[device] = PassContext(**kept, **moved)
        return self._elsewhere[device]

    def new_places(self) -> torch.Tensor:
        """The places of a single new token a row in the cache's storage, `[1]`; the same tensor at every step."""
        if self._places is None:
            self._places = torch.tensor([self.cache.get_seq_length()], device=self.position_ids.device)
        return self._places

    def watched(self, part: str, layer: int | None, step: int, value: torch.Tensor) -> torch.Tensor:
        """The value with which the pass continues: the part's own, unless a watcher replaces it."""
        for watcher in self.watchers:
            value = watcher(part, layer, step, value, self)
        return value

    def wants(self, part: str, layer: int | None, step: int) -> bool:
        """Whether a watcher asks for a part that is not computed otherwise."""
        return any(watcher.wants(part, layer, step) for watcher in self.watchers)

    def gather(self, subset: TokenSubset) -> "PassContext":
        """The context of some tokens of a pass; masks must be written out, `[B or 1, 1, T, S]`."""
        return replace(
            self,
            masks={kind: subset.gather(mask[:, 0])[:, None] for kind, mask in self.masks.items()},
            rotations={kind: (subset.gather(cos), subset.gather(sin)) for kind, (cos, sin) in self.rotations.items()},
            subset=subset,
        )

    def without_skipped(self, step: int, batch: int, tokens: int) -> "PassContext":
        """Under cache rule `skip`, the context that hides the tokens that never reached this step."""
        if self.cache is None or self.cache.rule.missing != "skip":
            return self
        steps_run = self.steps_run
        if steps_run is None:
            steps_run = torch.full((batch, tokens), step, device=self.position_ids.device)
        visible = self.cache.visible(step, steps_run)
        if visible is None:
            return self
        if self.subset is not None:
            visible = visible[self.subset.rows]
        return replace(self, masks={kind: _hide(mask, visible) for kind, mask in self.masks.items()})


def _moved(value: Any, device: torch.device, non_blocking: bool) -> Any:
    """A value with every tensor in it on `device`."""
    if isinstance(value, dict):
        return {key: _moved(part, device, non_blocking) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_moved(part, device, non_blocking) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{part.name: _moved(getattr(value, part.name), device, non_blocking) for part in fields(value)}
        )
    return value.to(device, non_blocking=non_blocking) if isinstance(value, torch.Tensor) else value


def _hide(mask: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """A mask `[B or 1, 1, T, S]`, bool or additive, without the keys that `visible` `[B, S]` leaves out."""
    seen = visible[:, None, None]
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, torch.finfo(mask.dtype).min)


def document_starts(position_ids: torch.Tensor, mask: torch.Tensor | None, past: int) -> torch.Tensor | None:
    """Where in a pass another document begins, `[B, T]`, bool; None where none does.

    Args:
        position_ids: `[B, T]`, as the caller gave them.
        mask: `[B, past + T]`, 1 for tokens and 0 for padding, next to which no document begins.
        past: how many tokens are stored.
    """
    if position_ids.shape[1] == 1:
        return None
    starts = torch.nn.functional.pad(torch.diff(position_ids, dim=1) != 1, (1, 0))
    if past:
        starts[:, 0] = position_ids[:, 0] == 0
    if mask is not None:
        real = mask[:, -position_ids.shape[1] :].bool()
        before = mask[:, past - 1 : -1].bool() if past else torch.nn.functional.pad(real[:, :-1], (1, 0))
        starts &= real & before
    return None if surely(~starts.any()) else starts


def _within_documents(mask: Any, documents: torch.Tensor) -> torch.Tensor:
    """A mask `[B or 1, 1, T, S]`, bool or additive, without the keys of other documents, which `[B, S]` tells apart."""
    same = (documents[:, None, -mask.shape[2] :, None] == documents[:, None, None, :]).to(mask.device)
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, torch.finfo(mask.dtype).min)


def written_kind(config: RecurrentDepthConfig) -> str:
    """The kind of attention for a pass whose masks must be written out: the model's own where it takes such masks."""
    if config._attn_implementation in WITH_WRITTEN_MASKS:
        return str(config._attn_implementation)
    return "eager" if config.attn_logit_softcapping is not None else "sdpa"


def _with_attention(config: RecurrentDepthConfig, kind: str) -> RecurrentDepthConfig:
    """The configuration as it would be with another kind of attention, for transformers' makers of masks."""
    if config._attn_implementation == kind:
        return config
    config = copy.copy(config)
    config._attn_implementation = kind
    return config


def check_cache(config: RecurrentDepthConfig, cache: Any) -> None:
    """Raises TypeError or ValueError for a cache that this model can't read."""
    if cache is not None and not isinstance(cache, RecurrentDepthCache):
        raise TypeError(
            f"past_key_values is a {type(cache).__name__}, but a depth-recurrent model needs a RecurrentDepthCache; "
            "leave it out to get one"
        )
    if cache is not None and (cache.lru is not None) != config.has_lru:
        raise UserError("past_key_values was made for a model with other layers; leave it out to get a fitting one")


def check_length(config: RecurrentDepthConfig, tokens: int) -> None:
    """Raises ValueError where a text has more tokens than the model allows."""
    if tokens > config.block_size:
        raise UserError(
            f"{tokens} tokens are more than the {config.block_size} this model allows; shorten the prompt or "
            "generate fewer tokens"
        )


def pass_context(
    config: RecurrentDepthConfig,
    hidden: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    cache: RecurrentDepthCache | None = None,
    whole_masks: bool = False,
) -> PassContext:
    """Masks, rotary angles and positions of one pass over `hidden` `[B, T, D]`.

    Args:
        attention_mask: `[B, S]`, 1 for tokens and 0 for padding, or `[B, 1, T, S]` as the attention takes it.
        position_ids: `[B or 1, T]`; counted without padding by default. Where they don't increase by one, another document
            begins, which sees nothing of the one before; at a pass's first token only where they are 0.
        whole_masks: write masks out even where all is causal, so that tokens can be gathered from them.

    Raises:
        ValueError: for a mask that does not cover stored and new tokens, or more tokens than the model allows.
        TypeError: for a cache of another model.
    """
    check_cache(config, cache)
    batch, tokens, _ = hidden.shape
    past = cache.get_seq_length() if cache is not None else 0
    total = past + tokens
    if attention_mask is not None and attention_mask.ndim == 2:
        if attention_mask.shape != (batch, total):
            raise UserError(
                f"attention_mask has shape {list(attention_mask.shape)}, but {past} stored and {tokens} new tokens "
                f"in {batch} rows need [{batch}, {total}]"
            )
    elif attention_mask is not None and (attention_mask.ndim != 4 or config.layer_types is not None):
        raise UserError(
            f"attention_mask has shape {list(attention_mask.shape)}; give [batch, tokens], or [batch, 1, new, all] "
            "to a model without sliding windows"
        )
    if cache is not None and (attention_mask is None or attention_mask.ndim == 2):
        attention_mask = cache.extend_padding_mask(attention_mask, tokens)

    padding_mask = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
    starts = None
    if position_ids is not None and (attention_mask is None or padding_mask is not None):
        starts = document_starts(position_ids.expand(batch, -1), padding_mask, past)
    if position_ids is None:
        if padding_mask is not None:
            position_ids = (padding_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        else:
            position_ids = torch.arange(past, total, device=hidden.device)[None]
    if total > config.block_size and not is_tracing(position_ids):
        # Padding and other documents are not counted.
        check_length(config, int(position_ids.max()) + 1)
    documents = None
    if cache is not None:
        documents = cache.extend_documents(starts, tokens)
    elif starts is not None:
        documents = starts.cumsum(1)
    attention_types = sorted(set(config.layer_types or ["full_attention"]) - {LRU_LAYER})
    reading = None
    if config.has_lru:
        reading = reading_order(
            batch,
            tokens,
            past,
            config.conv1d_width,
            padding_mask,
            starts,
            device=hidden.device,
        )
    whole_batch = padding_mask is None or starts is None or surely(padding_mask.all())
    only_documents = starts is not None and past == 0 and whole_batch
    attention = config._attn_implementation
    given_whole = attention_mask is not None and padding_mask is None
    if whole_masks or given_whole or (documents is not None and not (only_documents and attention == "flex_attention")):
        attention = written_kind(config)
    mask_inputs: dict[str, Any] = {
        "config": _with_attention(config, attention),
        "inputs_embeds": hidden,
        "attention_mask": attention_mask,
        "past_key_values": cache,
        "allow_is_causal_skip": not whole_masks,
    }
    if only_documents:
        # transformers itself makes the masks of packed documents where a row holds nothing else.
        mask_inputs |= {"attention_mask": None, "past_key_values": None, "position_ids": position_ids}
        documents = None
    elif documents is not None:
        mask_inputs["allow_is_causal_skip"] = False
    plain = set()
    if not whole_masks and documents is None and starts is None:
        plain = {kind for kind in attention_types if _needs_no_mask(config, kind, attention_mask, hidden, past)}
    masks = {kind: None if kind in plain else MASK_MAKERS[kind](**mask_inputs) for kind in attention_types}
    if documents is not None:
        masks = {kind: _within_documents(mask, documents) for kind, mask in masks.items()}
    return PassContext(
        masks=masks,
        rotations={kind: rotations(config, position_ids, kind) for kind in attention_types},
        cache=cache,
        position_ids=position_ids,
        attention=attention,
        reading=reading,
    )


def _needs_no_mask(
    config: RecurrentDepthConfig, kind: str, attention_mask: torch.Tensor | None, hidden: torch.Tensor, past: int
) -> bool:
    """Whether attention of this kind over new tokens `hidden` `[B, T, D]` is plainly causal, which sdpa knows by itself."""
    tokens = hidden.shape[1]
    if config._attn_implementation != "sdpa" or is_tracing(hidden):
        return False
    window = config.sliding_window if kind == "sliding_attention" else None
    if window is not None and past + tokens > window:
        return False
    # Elsewhere than on a processor torch's kernels take the first key for the first query's own.
    knows = tokens == 1 or past == 0 or hidden.device.type == "cpu"
    return knows and (attention_mask is None or (attention_mask.ndim == 2 and surely(attention_mask.all())))


def ragged_context(
    config: RecurrentDepthConfig,
    cache: RecurrentDepthCache,
    seen: torch.Tensor,
    places: torch.Tensor,
    positions: torch.Tensor,
    real: torch.Tensor,
) -> PassContext:
    """The context of a pass in which every row is at another place, and reads every earlier place of its own.

    Args:
        seen: `[B, prompt]`, which columns of the prompts are tokens.
        places: `[B, T]`, the index of each new token in its row, padding included.
        positions: `[B, T]`, the same without padding.
        real: `[B, T]`, which of them are tokens; the others' keys and values are not stored.

    Raises:
        ValueError: for more tokens than the model allows.
    """
    start, end = seen.shape[1], int(places.max()) + 1
    check_length(config, end)
    everywhere = torch.arange(end, device=places.device)
    known = torch.nn.functional.pad(seen, (0, end - start), value=True)
    masks = {"full_attention": ((everywhere <= places[..., None]) & known[:, None])[:, None]}
    if config.sliding_window:
        in_window = (everywhere > places[..., None] - config.sliding_window)[:, None]
        masks["sliding_attention"] = masks["full_attention"] & in_window
    kinds = set(config.layer_types or ["full_attention"])
    return PassContext(
        masks={kind: masks[kind] for kind in kinds},
        rotations={kind: rotations(config, positions, kind) for kind in kinds},
        cache=cache,
        position_ids=positions,
        attention=written_kind(config),
        subset=TokenSubset(
            torch.arange(len(places), device=places.device), places - start, real, len(places), end - start
        ),
    )


def following_context(config: RecurrentDepthConfig, cache: RecurrentDepthCache, positions: torch.Tensor) -> PassContext:
    """The context of new tokens of one row without padding, which follow what the cache holds.

    Args:
        positions: `[1, T]`, of the new tokens.

    Raises:
        ValueError: for more tokens than the model allows.
    """
    past, tokens, device = cache.get_seq_length(), positions.shape[1], positions.device
    check_length(config, past + tokens)
    attention = written_kind(config)
    kinds = sorted(set(config.layer_types or ["full_attention"]))
    causal_by_itself = attention == "sdpa" and (tokens == 1 or device.type == "cpu")
    masks: dict[str, torch.Tensor | None] = {}
    for kind in kinds:
        window = config.sliding_window if kind == "sliding_attention" else None
        if causal_by_itself and (window is None or past + tokens <= window):
            masks[kind] = None
            continue
        reads = torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril(past)
        masks[kind] = (reads if window is None else reads.triu(past - window + 1))[None, None]
    return PassContext(
        masks=masks,
        rotations={kind: rotations(config, positions, kind) for kind in kinds},
        cache=cache,
        position_ids=positions,
        attention=attention,
    )

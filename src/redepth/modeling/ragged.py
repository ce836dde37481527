"""Decoding in which the rows of a batch advance at their own pace: what speculation and the wavefront share.

Shapes: B rows, T tokens of a row in this pass, V vocabulary. A *place* is a token's index in its row, padding included.
"""

from typing import Any

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .cache import RecurrentDepthCache
from .errors import UserError
from .passes import PassContext, following_context, ragged_context
from .policy import DepthPolicy
from .tokens import check_numbers


class RaggedRows:
    """The sequences of one generate call, the cache they share, and how far each row has got.

    Args:
        model: the recurrent model.
        input_ids: prompts `[B, tokens]`, padded on the left.
        prepared: what else `generate` passes to a decoding method.

    Raises:
        ValueError: for settings of `generate` that this kind of decoding can't serve.
    """

    def __init__(self, model: Any, input_ids: torch.Tensor, prepared: dict[str, Any]) -> None:
        self.model = model
        self.settings = prepared["generation_config"]
        for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
            if self.settings.return_dict_in_generate and getattr(self.settings, name):
                raise UserError(f"{name}=True is not supported with draft_steps or a sampler; leave it out")
        if self.settings.num_beams > 1:
            raise UserError(f"num_beams={self.settings.num_beams} is not supported with draft_steps or a sampler")
        if input_ids.shape[1] == 0 or prepared.get("inputs_embeds") is not None:
            raise UserError("draft_steps and samplers need a prompt of input_ids with at least one token")
        self.processors = prepared["logits_processor"]
        self.stopping = prepared["stopping_criteria"]
        self.streamer = prepared["streamer"]
        self.cache: RecurrentDepthCache = prepared["past_key_values"]
        self.start = input_ids.shape[1]
        rows, pad = len(input_ids), self.settings._pad_token_tensor
        self.pad = int(pad) if pad is not None else 0
        self.ids = input_ids.new_full((rows, self.settings.max_length), self.pad)
        self.ids[:, : self.start] = input_ids
        self.lengths = torch.full((rows,), self.start, device=input_ids.device)
        self.running = torch.ones(rows, dtype=torch.bool, device=input_ids.device)
        self._prompt = {name: prepared.get(name) for name in ("attention_mask", "position_ids")}

    def prefill(self, policy: DepthPolicy) -> torch.Tensor:
        """Run the part of the prompts that the cache does not hold; returns the logits after their last tokens, `[B, V]`."""
        past, mask, positions = (
            self.cache.get_seq_length(),
            self._prompt["attention_mask"],
            self._prompt["position_ids"],
        )
        size = self.settings.prefill_chunk_size or self.start
        # generate() gives the positions of all tokens, or of those that the cache does not hold.
        shift = positions.shape[1] - self.start if positions is not None else 0
        for begin in range(past, self.start, size):
            end = min(begin + size, self.start)
            output = self.model(
                self.ids[:, begin:end],
                attention_mask=mask[:, :end] if mask is not None else None,
                position_ids=positions[:, begin + shift : end + shift] if positions is not None else None,
                past_key_values=self.cache,
                policy=policy.one_pass(),
                logits_to_keep=1,
            )
        if self.cache.documents is not None:
            raise UserError("drafts and samplers can't go on from a prompt of several documents; leave them out")
        known = self.cache.padding_mask
        self.seen = known.bool() if known is not None else torch.ones_like(self.ids[:, : self.start], dtype=torch.bool)
        self.first_position = positions[:, -1] + 1 if positions is not None else self.seen.sum(1)
        self.is_single = len(self.ids) == 1 and bool(self.seen.all())
        return output.logits[:, -1]

    def context(self, places: torch.Tensor, real: torch.Tensor) -> PassContext:
        """Masks, angles and positions of tokens at `places` `[B, T]`, which read every earlier place of their row.

        Args:
            real: `[B, T]`, which of them are tokens; the others' keys and values are not stored.

        Raises:
            ValueError: for more tokens than the model allows.
        """
        positions = self.first_position[:, None] + places - self.start
        return ragged_context(self.model.config, self.cache, self.seen, places, positions, real)

    def following_context(self, first: int, tokens: int) -> PassContext | None:
        """The same for tokens at places that follow one another, of a single row without padding: as plain decoding does it.

        Its keys and values are written side by side, after those of the places before `first`, whatever lay there.

        Returns:
            None for other rows.
        """
        if not self.is_single:
            return None
        self.cache.length = first
        positions = (
            self.first_position[:, None] + torch.arange(first, first + tokens, device=self.ids.device) - self.start
        )
        return following_context(self.model.config, self.cache, positions)

    def processed(self, logits: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits `[B, V]` as `generate`'s processors leave them for rows of these lengths, in fp32."""
        check_numbers(logits)
        logits = logits.float()
        if not len(self.processors):
            return logits
        result = torch.empty_like(logits)
        # Some processors keep a record of each row, so that every call needs the whole batch.
        for length in lengths.unique().tolist():
            these = lengths == length
            result[these] = self.processors(self.ids[:, :length], logits.clone())[these]
        return result

    def append(self, row: int, tokens: list[int]) -> int:
        """Add tokens to a row until one of them ends it; returns how many were added."""
        begin = int(self.lengths[row])
        for end, token in enumerate(tokens, begin + 1):
            self.ids[row, end - 1] = token
            self.lengths[row] = end
            if bool(self.stopping(self.ids[row : row + 1, :end], None)[0]):
                self.running[row] = False
                break
        added = int(self.lengths[row]) - begin
        if self.streamer is not None and added:
            self.streamer.put(self.ids[row, begin : begin + added].cpu())
        return added

    def finish(self, steps_run: torch.Tensor, stats: dict[str, Any]) -> GenerateDecoderOnlyOutput | torch.Tensor:
        """End the call: the cache holds all but each row's last token, shorter rows end in padding.

        Args:
            steps_run: `[B, tokens]`, of the tokens after the prompts.
        """
        if self.streamer is not None:
            self.streamer.end()
        width = int(self.lengths.max())
        beyond = torch.arange(self.ids.shape[1], device=self.ids.device) >= self.lengths[:, None]
        ids = self.ids.masked_fill(beyond, self.pad)[:, :width]
        self.cache.length = self.start
        self.cache.settle(self.lengths - 1, steps_run)
        if not self.settings.return_dict_in_generate:
            return ids
        output = GenerateDecoderOnlyOutput(sequences=ids, past_key_values=self.cache)  # type: ignore[arg-type]
        output["stats"] = stats | {"num_steps": self.cache.steps_run}
        return output

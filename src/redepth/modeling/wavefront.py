"""Wavefront sampling: all tokens that have not settled advance together, a few steps of the core each.

After Geiping et al. 2025, "Efficient parallel samplers for recurrent-depth models and their connection to diffusion
language models": a token's place is opened before the token preceding it is certain, and what it holds is refined as its
neighbours are. Not lossless: tokens read what their neighbours hold at the moment, not the neighbours' step i.
"""

from typing import Any

import torch

from .policy import DepthPolicy
from .ragged import RaggedRows


class Chooser:
    """Picks the token after each place; the sampling noise of a place stays the same, so a pick changes only if the logits do
    (the Gumbel-max trick)."""

    def __init__(self, rows: RaggedRows) -> None:
        self.rows = rows
        self.seed = int(torch.randint(2**31, ())) if rows.settings.do_sample else None

    def pick(self, logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """From logits `[B, T, V]` after `places` `[B, T]`, tokens `[B, T]`."""
        return torch.stack([self._pick_one(logits[:, i], places[:, i]) for i in range(logits.shape[1])], dim=1)

    def _pick_one(self, logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        scores = self.rows.processed(logits, places + 1)
        if self.seed is not None:
            for row, place in enumerate(places.tolist()):
                own = torch.Generator().manual_seed((self.seed + place) * len(places) + row)
                uniform = torch.rand(scores.shape[1], generator=own).to(scores.device)
                scores[row] = scores[row] - torch.log(-torch.log(uniform))
        return scores.argmax(-1)


@torch.no_grad()
def wavefront_decoding(
    model: Any,
    input_ids: torch.Tensor,
    streamer: Any = None,
    tokenizer: Any = None,
    **prepared: Any,
) -> Any:
    """A decoding method for transformers' `generate(custom_generate=…)`.

    At every pass each row's open places run the prelude on their token so far, `inner_steps` steps and the coda, whose
    picks become the tokens of the places after them. The leading places whose state has settled, or that ran `num_steps`
    since their token last changed, are closed for good.

    Args:
        input_ids: `[B, tokens]`.
        prepared: what `generate` hands over besides, the policy among it.

    Returns:
        token ids `[B, tokens]`, or an output whose `stats` has `passes` (through the core's open places in parallel),
        `core_passes` in tokens, and `agreement` where asked for.
    """
    policy: DepthPolicy = prepared["policy"]
    settings = policy.wavefront
    assert settings is not None
    rows = RaggedRows(model, input_ids, prepared | {"streamer": streamer})
    stack, device, batch = model.transformer, rows.ids.device, len(input_ids)
    chooser = Chooser(rows)
    first = chooser.pick(rows.prefill(policy)[:, None], (rows.lengths - 1)[:, None])
    for row, token in enumerate(first[:, 0].tolist()):
        rows.append(row, [token])

    places_in_all = max(rows.ids.shape[1] - 1 - rows.start, 1)
    states = torch.zeros(batch, places_in_all, model.config.n_embd, dtype=model.dtype, device=device)
    # Steps since the token of a place last changed, and in all.
    steady, steps = (torch.zeros(batch, places_in_all, dtype=torch.long, device=device) for _ in range(2))
    guesses = torch.full((batch, places_in_all + 1), -1, device=device)
    guesses[:, 0] = first[:, 0]
    opened = torch.ones(batch, dtype=torch.long, device=device)
    every_row = torch.arange(batch, device=device)[:, None]
    passes = core_passes = 0
    while bool(rows.running.any()):
        closed = rows.lengths - 1 - rows.start
        width = int((opened - closed)[rows.running].max())
        index = closed[:, None] + torch.arange(width, device=device)
        real = (index < opened[:, None]) & rows.running[:, None]
        index = index.clamp(max=places_in_all - 1)
        context = rows.context(index + rows.start, real)
        embedded = stack.run_prelude(stack.embed(guesses[every_row, index].clamp(min=0)), context)
        begun = stack.initial_state(embedded, context.position_ids, policy.state_seed)
        old = torch.where((steps[every_row, index] == 0)[..., None], begun, states[every_row, index])
        state = (1 - settings.noise_mix) * old + settings.noise_mix * begun if settings.noise_mix else old
        context.continued = steps[every_row, index] > 0
        for _ in range(settings.inner_steps):
            state = stack.step(embedded, state, context, 1)
            context.continued = True
        picked = chooser.pick(model.read_logits(state, context), index + rows.start)
        moved = (state - old).float().norm(dim=-1) / state.float().norm(dim=-1)
        passes, core_passes = passes + 1, core_passes + int(real.sum()) * settings.inner_steps

        states[_cells(index, real)] = state[real]
        steps[_cells(index, real)] += settings.inner_steps
        steady[_cells(index, real)] += settings.inner_steps
        settled = real & ((moved < settings.exit_threshold) | (steady[every_row, index] >= policy.num_steps))
        unchanged = guesses[every_row, index + 1] == picked
        # A place closes together with all before it, if it has just run on the token that they predict.
        settled[:, 1:] &= unchanged[:, :-1]
        closing = settled.long().cumprod(1).sum(1)
        changed = real & ~unchanged
        guesses[_cells(index + 1, changed)] = picked[changed]
        steady[_cells(index + 1, changed & (index + 1 < places_in_all))] = 0

        for row in rows.running.nonzero()[:, 0].tolist():
            begin = int(closed[row])
            # A closed place makes the token after it final.
            rows.append(row, guesses[row, begin + 1 : begin + 1 + int(closing[row])].tolist())
        opened = torch.minimum(opened + settings.headway, closed + closing + settings.max_wavefront)
        opened = opened.clamp(max=places_in_all)
        _guess_onwards(guesses, opened)
        # Beyond the end of a row, logits processors read the tokens of its open places.
        _show_guesses(rows, guesses)
    closed = rows.lengths - 1 - rows.start
    stats: dict[str, Any] = {"passes": passes, "core_passes": core_passes}
    if settings.report_agreement:
        stats["agreement"] = agreement_with_plain(rows, chooser, policy)
    return rows.finish(steps[:, : int(closed.max())], stats)


def _cells(index: torch.Tensor, chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the chosen entries of `index` `[B, W]`, which names a column for each row."""
    rows = torch.arange(len(index), device=index.device)[:, None].expand_as(index)
    return rows[chosen], index[chosen]


def _guess_onwards(guesses: torch.Tensor, opened: torch.Tensor) -> None:
    """Give places opened beyond the last guess the same token as the place before them."""
    for row, end in enumerate(opened.tolist()):
        known = int((guesses[row] >= 0).sum())
        if known < end:
            guesses[row, known:end] = guesses[row, known - 1]


def _show_guesses(rows: RaggedRows, guesses: torch.Tensor) -> None:
    ahead = torch.arange(rows.ids.shape[1], device=rows.ids.device) >= rows.lengths[:, None]
    shown = torch.cat([rows.ids[:, : rows.start], guesses.clamp(min=0)], dim=1)[:, : rows.ids.shape[1]]
    rows.ids[:] = torch.where(ahead & rows.running[:, None], shown, rows.ids)


def agreement_with_plain(rows: RaggedRows, chooser: Chooser, policy: DepthPolicy) -> float:
    """Which share of the new tokens plain decoding at the same depth would have chosen after the same tokens before them."""
    end = int(rows.lengths.max())
    mask = torch.nn.functional.pad(rows.seen.long(), (0, end - 1 - rows.start), value=1)
    model, kept = rows.model, end - rows.start
    output = model(
        rows.ids[:, : end - 1],
        attention_mask=mask,
        num_steps=policy.num_steps,
        state_seed=policy.state_seed,
        cache_rule="full",
        use_cache=False,
        logits_to_keep=kept,
    )
    places = torch.arange(rows.start - 1, end - 1, device=rows.ids.device).expand(len(rows.ids), -1)
    same = chooser.pick(output.logits, places) == rows.ids[:, rows.start : end]
    return float(same[places + 1 < rows.lengths[:, None]].float().mean())

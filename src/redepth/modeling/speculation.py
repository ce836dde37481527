"""Self-speculative decoding: draft with few steps of the core, verify with all of them in one pass.

Draft and target are the same model at two depths. At steps up to `draft_steps` a drafted token's states, keys and values are
what plain decoding would compute, so the deep pass continues from them instead of starting again; only the coda is run
twice. Acceptance is Leviathan et al. 2023, algorithm 1: what is emitted has the distribution of the deep model.
"""

from typing import Any

import torch

from .policy import DepthPolicy
from .ragged import RaggedRows

MOST_DRAFTED = 16
START_RATE = 0.8  # the acceptance rate assumed before the first round
MEMORY = 0.9  # the weight of the old estimate after a round


def draft_length(rate: float, draft_cost: float, verify_cost: float) -> int:
    """How many tokens to draft so that most tokens come out per unit of time.

    A round of k drafts gives (1 − rate^k) / (1 − rate) tokens on average for k shallow passes and a deep one, whose
    time hardly depends on k where it is spent reading weights.

    Args:
        rate: the chance that a drafted token is accepted.
        draft_cost, verify_cost: of one pass, in layers.
    """

    def tokens_for_cost(k: int) -> float:
        return sum(rate**i for i in range(k)) / (k * draft_cost + verify_cost)

    return max(range(1, MOST_DRAFTED + 1), key=tokens_for_cost)


def choose(rows: RaggedRows, scores: torch.Tensor) -> torch.Tensor:
    """The next token of each row, `[B]`, from processed logits `[B, V]`: the likeliest, or a sampled one."""
    if not rows.settings.do_sample:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


class DraftRound:
    """One round: k drafted tokens for every row, `[B, k]`, and what the deep model makes of them."""

    def __init__(self, rows: RaggedRows, k: int, policy: DepthPolicy) -> None:
        model, stack = rows.model, rows.model.transformer
        assert policy.draft_steps is not None
        # The last token of each row is not in the cache yet: it is the first to run.
        places = (rows.lengths - 1)[:, None] + torch.arange(k, device=rows.ids.device)
        # The token at the very last place is never run.
        real = (places < rows.ids.shape[1] - 1) & rows.running[:, None]
        places = places.clamp(max=rows.ids.shape[1] - 2)
        embeddeds, states, self.drafted, self.drafted_from = [], [], [], []
        for i in range(k):
            context = rows.context(places[:, i : i + 1], real[:, i : i + 1])
            token = rows.ids.gather(1, places[:, i : i + 1])
            embedded = stack.run_prelude(stack.embed(token), context)
            state = stack.initial_state(embedded, context.position_ids, policy.state_seed)
            state = stack.run_fixed(embedded, state, context, policy.draft_steps)
            scores = rows.processed(model.read_logits(state, context)[:, 0], places[:, i] + 1)
            chosen = choose(rows, scores)
            next_places = places[:, i : i + 1] + 1
            chosen = torch.where(real[:, i], chosen, rows.ids.gather(1, next_places)[:, 0])
            rows.ids.scatter_(1, next_places, chosen[:, None])
            embeddeds.append(embedded)
            states.append(state)
            self.drafted.append(chosen)
            self.drafted_from.append(scores)
        context = rows.context(places, real)
        embedded, state = torch.cat(embeddeds, dim=1), torch.cat(states, dim=1)
        state = stack.run_fixed(embedded, state, context, policy.num_steps, first=policy.draft_steps + 1)
        logits = model.read_logits(state, context)
        self.wanted = [rows.processed(logits[:, i], places[:, i] + 1) for i in range(k)]

    def emitted(self, row: int, do_sample: bool) -> tuple[list[int], int]:
        """The tokens that this round gives a row, and how many of them were drafted."""
        tokens: list[int] = []
        for drafted, from_scores, wanted in zip(self.drafted, self.drafted_from, self.wanted, strict=True):
            token = int(drafted[row])
            if not do_sample:
                right = int(wanted[row].argmax())
                if token != right:
                    return [*tokens, right], len(tokens)
            else:
                p, q = wanted[row].softmax(-1), from_scores[row].softmax(-1)
                if torch.rand((), device=p.device) * q[token] >= p[token]:
                    rest = (p - q).clamp(min=0)
                    return [*tokens, int(torch.multinomial(rest / rest.sum(), 1))], len(tokens)
            tokens.append(token)
        return tokens, len(tokens)


@torch.no_grad()
def speculative_decoding(
    model: Any,
    input_ids: torch.Tensor,
    streamer: Any = None,
    tokenizer: Any = None,
    **prepared: Any,
) -> Any:
    """A decoding method for transformers' `generate(custom_generate=…)`.

    Greedy output is token for token that of plain decoding at `num_steps` (where two logits differ by less than the
    rounding of a batched product, either may win); sampled output has its distribution. Rows of a batch accept different
    numbers of tokens and advance independently.

    Args:
        input_ids: `[B, tokens]`.
        prepared: what `generate` hands over besides, the policy among it.

    Returns:
        token ids `[B, tokens]`, or an output whose `stats` count the `rounds` and the tokens `drafted` and `accepted`.
    """
    policy: DepthPolicy = prepared["policy"]
    rows = RaggedRows(model, input_ids, prepared | {"streamer": streamer})
    config, do_sample, draft_steps = model.config, rows.settings.do_sample, policy.draft_steps
    assert draft_steps is not None
    draft_cost = config.n_layers_in_prelude + draft_steps * config.n_layers_in_recurrent_block + config.n_layers_in_coda
    verify_cost = (policy.num_steps - draft_steps) * config.n_layers_in_recurrent_block + config.n_layers_in_coda
    first = choose(rows, rows.processed(rows.prefill(policy), rows.lengths))
    for row, token in enumerate(first.tolist()):
        rows.append(row, [token])
    rate, rounds, drafted, accepted = START_RATE, 0, 0, 0
    while bool(rows.running.any()):
        room = rows.ids.shape[1] - int(rows.lengths[rows.running].min())
        k = min(policy.draft_tokens or draft_length(rate, draft_cost, verify_cost), room)
        running = int(rows.running.sum())
        one = DraftRound(rows, k, policy)
        kept = tried = 0
        for row in rows.running.nonzero()[:, 0].tolist():
            tokens, agreed = one.emitted(row, do_sample)
            kept, tried = kept + agreed, tried + min(agreed + 1, k)
            rows.append(row, tokens[: rows.ids.shape[1] - int(rows.lengths[row])])
        rounds, drafted, accepted = rounds + 1, drafted + k * running, accepted + kept
        rate = MEMORY * rate + (1 - MEMORY) * kept / tried
    steps_run = torch.full(
        (len(input_ids), int(rows.lengths.max()) - 1 - rows.start), policy.num_steps, device=input_ids.device
    )
    return rows.finish(steps_run, {"rounds": rounds, "drafted": drafted, "accepted": accepted})

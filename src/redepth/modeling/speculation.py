"""Self-speculative decoding: draft with few steps of the core, verify with all of them in one pass.

Draft and target are the same model at two depths. At steps up to `draft_steps` a drafted token's states, keys and values are
what plain decoding would compute, so the deep pass continues from them instead of starting again; only the coda is run
twice. Where the draft reads narrow weights (`drafting`) they are not, and the deep pass runs every step itself, over the keys
and values that the draft left. Acceptance is Leviathan et al. 2023, algorithm 1: what is emitted has the distribution of the
deep model.

Shapes: B rows, k drafted tokens of each, V vocabulary.
"""

from typing import Any

import torch

from .configuration import RecurrentDepthConfig
from .drafting import drafter_of
from .passes import PassContext
from .policy import DepthPolicy
from .ragged import RaggedRows

MOST_DRAFTED = 32
START_RATE = 0.9  # the acceptance rate assumed before the first round
START_WEIGHT = 2  # as if it had been seen on so many drafted tokens
MEMORY = 0.9  # the weight of the old estimate after a round
# What a further token adds to a pass, as a share of the pass over one: a processor computes, but reads its weights once.
TOKEN_COST = 0.05
NARROW_COST = 0.5  # of a pass with narrow weights


def draft_length(rate: float, draft_cost: float, verify_cost: float, rows: int = 1) -> int:
    """How many tokens to draft so that most tokens come out per unit of time.

    A round of k drafts gives (1 − rate^(k + 1)) / (1 − rate) tokens on average for k shallow passes and a deep one.

    Args:
        rate: the chance that a drafted token is accepted.
        draft_cost, verify_cost: of one pass over one token a row, in layers.
        rows: how many draft side by side, each of which the deep pass has to compute.
    """

    def pass_over(tokens: int) -> float:
        return 1 + TOKEN_COST * (tokens - 1)

    def tokens_for_cost(k: int) -> float:
        deep = verify_cost * pass_over(rows * (k + 1)) / pass_over(rows)
        return sum(rate**i for i in range(k + 1)) / (k * draft_cost + deep)

    return max(range(1, MOST_DRAFTED + 1), key=tokens_for_cost)


def choose(rows: RaggedRows, scores: torch.Tensor) -> torch.Tensor:
    """The next token of each row, `[B]`, from processed logits `[B, V]`: the likeliest, or a sampled one."""
    if not rows.settings.do_sample:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


class DraftRound:
    """One round: k drafted tokens for every row, `[B, k]`, and what the deep model makes of them and of the token after.

    Args:
        drafter: makes the drafts: the model itself, or its twin.
    """

    def __init__(self, rows: RaggedRows, k: int, policy: DepthPolicy, drafter: Any) -> None:
        self.rows, self.policy = rows, policy
        # The last token of each row is not in the cache yet: it is the first to run.
        places = (rows.lengths - 1)[:, None] + torch.arange(k + 1, device=rows.ids.device)
        # The token at the very last place is never run.
        self.real = (places < rows.ids.shape[1] - 1) & rows.running[:, None]
        self.places = places.clamp(max=rows.ids.shape[1] - 2)
        self.drafted: list[torch.Tensor] = []
        self.drafted_from: list[torch.Tensor] = []
        begun = [self._draft(drafter, index) for index in range(k)]
        # What the model itself has drafted is the beginning of its deep pass; the last token gets there without a coda.
        logits = self._verify([*begun, self._shallow(drafter, k)[:2]] if drafter is rows.model else None)
        self.wanted = [rows.processed(logits[:, i], self.places[:, i] + 1) for i in range(k + 1)]

    def _begin(self, model: Any, first: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, PassContext]:
        """e and s_0 of some of the round's tokens, `[B, tokens, D]`, and their context."""
        context, stack = self._context(first, tokens), model.transformer
        ids = self.rows.ids.gather(1, self.places[:, first : first + tokens])
        embedded = stack.run_prelude(stack.embed(ids), context)
        return embedded, stack.initial_state(embedded, context.position_ids, self.policy.state_seed), context

    def _shallow(self, model: Any, index: int) -> tuple[torch.Tensor, torch.Tensor, PassContext]:
        """e and the state at the draft's depth of one token of each row, `[B, 1, D]`, and the context."""
        assert self.policy.draft_steps is not None
        embedded, state, context = self._begin(model, index, 1)
        return embedded, model.transformer.run_fixed(embedded, state, context, self.policy.draft_steps), context

    def _draft(self, drafter: Any, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Let the token after one of the round's be drafted; returns e and the state that this took, `[B, 1, D]`."""
        embedded, state, context = self._shallow(drafter, index)
        ids, places = self.rows.ids, self.places[:, index] + 1
        scores = self.rows.processed(drafter.read_logits(state, context)[:, 0], places)
        chosen = choose(self.rows, scores)
        chosen = torch.where(self.real[:, index], chosen, ids.gather(1, places[:, None])[:, 0])
        ids.scatter_(1, places[:, None], chosen[:, None])
        self.drafted.append(chosen)
        self.drafted_from.append(scores)
        return embedded, state

    def _verify(self, begun: list[tuple[torch.Tensor, torch.Tensor]] | None) -> torch.Tensor:
        """The deep model's logits after each of the round's tokens, `[B, k + 1, V]`.

        Args:
            begun: e and the state at the draft's depth of each of them; None where the deep pass runs every step.
        """
        model, tokens, done = self.rows.model, self.places.shape[1], 0
        if begun is None:
            embedded, state, context = self._begin(model, 0, tokens)
        else:
            assert self.policy.draft_steps is not None
            embedded, state = (torch.cat(parts, dim=1) for parts in zip(*begun, strict=True))
            context, done = self._context(0, tokens), self.policy.draft_steps
        state = model.transformer.run_fixed(embedded, state, context, self.policy.num_steps, first=done + 1)
        return model.read_logits(state, context)

    def _context(self, first: int, tokens: int) -> PassContext:
        following = self.rows.following_context(int(self.rows.lengths[0]) - 1 + first, tokens)
        if following is not None:
            return following
        these = slice(first, first + tokens)
        return self.rows.context(self.places[:, these], self.real[:, these])

    def emitted(self, row: int) -> tuple[list[int], int]:
        """The tokens that this round gives a row, and how many of them were drafted."""
        tokens: list[int] = []
        do_sample = self.rows.settings.do_sample
        for drafted, from_scores, wanted in zip(self.drafted, self.drafted_from, self.wanted, strict=False):
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
        # Every draft was right, so what the deep model says after the last of them counts as well.
        return [*tokens, int(choose(self.rows, self.wanted[-1][row : row + 1]))], len(tokens)


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
    drafter = drafter_of(model, policy.draft_bits)
    draft_cost, verify_cost = costs(model.config, policy, drafter is not model)
    first = choose(rows, rows.processed(rows.prefill(policy), rows.lengths))
    for row, token in enumerate(first.tolist()):
        rows.append(row, [token])
    rounds = drafted = accepted = 0
    seen, right = float(START_WEIGHT), START_RATE * START_WEIGHT
    while bool(rows.running.any()):
        room = rows.ids.shape[1] - int(rows.lengths[rows.running].min())
        running = int(rows.running.sum())
        k = min(policy.draft_tokens or draft_length(right / seen, draft_cost, verify_cost, running), room - 1)
        one = DraftRound(rows, k, policy, drafter)
        kept = tried = 0
        for row in rows.running.nonzero()[:, 0].tolist():
            tokens, agreed = one.emitted(row)
            kept, tried = kept + agreed, tried + min(agreed + 1, k)
            rows.append(row, tokens[: rows.ids.shape[1] - int(rows.lengths[row])])
        rounds, drafted, accepted = rounds + 1, drafted + k * running, accepted + kept
        seen, right = MEMORY * seen + tried, MEMORY * right + kept
    steps_run = torch.full(
        (len(input_ids), int(rows.lengths.max()) - 1 - rows.start), policy.num_steps, device=input_ids.device
    )
    return rows.finish(steps_run, {"rounds": rounds, "drafted": drafted, "accepted": accepted})


def costs(config: RecurrentDepthConfig, policy: DepthPolicy, narrow: bool) -> tuple[float, float]:
    """Of a draft and of a deep pass over one token, in layers; the head counts as what its weights are in layers."""
    assert policy.draft_steps is not None
    layer = 4 * config.n_embd**2 + 3 * config.n_embd * config.intermediate_size
    ends = config.n_layers_in_prelude + config.n_layers_in_coda + config.vocab_size * config.n_embd / layer
    core = config.n_layers_in_recurrent_block
    draft = ends + policy.draft_steps * core
    if narrow:
        return NARROW_COST * draft, ends + policy.num_steps * core
    return draft, ends - config.n_layers_in_prelude + (policy.num_steps - policy.draft_steps) * core

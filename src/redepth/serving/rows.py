"""One running request: its text, its blocks, and its tokens in the loop.

Shapes: T tokens of the row in the loop (one when it decodes, a piece of the prompt before), D width, V vocabulary.
"""

import torch

from redepth.modeling import RecurrentDepthConfig

from .paged import Part
from .pool import Planes, Pool, Table
from .request import Request, Token
from .sampling import Sampler


def capacity(config: RecurrentDepthConfig, request: Request) -> int:
    """The most tokens that a request stores; the last generated one is never run."""
    return min(len(request.prompt) + request.sampling.max_new_tokens - 1, config.block_size)


class Row:
    """A request that runs.

    Attributes:
        stored: how many tokens of its text have left the loop.
        coming: the tokens that enter next; empty while some are in the loop.
        embedded, state: e and s of the tokens in the loop, `[T, D]`.
        step: how many steps those that are still active have run.
        active: `[n]`, which of the T are still active; empty when the row can leave.
        logits: `[V]`, of the token that leaves, where an exit test has read them.
        carried: s_r of the last token, `[D]`.
        waited: how many ticks the row has been ready to leave.
    """

    def __init__(self, request: Request, config: RecurrentDepthConfig, pool: Pool, chunk: int) -> None:
        self.request, self.policy = request, request.policy
        self.planes, self.chunk, self.device = Planes(config), chunk, pool.keys.device
        most = capacity(config, request)
        self.table = Table(pool, self.planes.count(self.policy), most)
        self.sampler = Sampler(request.sampling, self.device)
        self.hides = self.policy.cache_rule.missing == "skip"
        # How many steps each token has run so far.
        self.ran = torch.zeros(most, dtype=torch.long, device=self.device)
        self.stored = 0
        self.coming: tuple[int, ...] = request.prompt[:chunk]
        self.embedded = self.state = torch.empty(0, device=self.device)
        self.active = torch.empty(0, dtype=torch.long, device=self.device)
        self.step, self.waited, self.count = 0, 0, 0
        self.starts_fresh = True
        self.tracker = self.policy.tracker()
        self.logits: torch.Tensor | None = None
        self.carried: torch.Tensor | None = None

    @property
    def in_loop(self) -> bool:
        return self.count > 0

    @property
    def is_ready(self) -> bool:
        """Whether all its tokens have done their steps, and can leave the loop."""
        return self.in_loop and not len(self.active)

    @property
    def in_prompt(self) -> bool:
        """Whether the tokens that come next, or are in the loop, are of the prompt."""
        return self.stored < len(self.request.prompt)

    @property
    def prompt_tokens(self) -> int:
        """How many tokens of its prompt are in the loop."""
        return self.count if self.in_prompt else 0

    def enter(self) -> Part:
        """Open a pass for the tokens that come next."""
        self.count, self.step, self.waited, self.logits = len(self.coming), 0, 0, None
        self.table.reach(self.stored + self.count)
        self.active = torch.arange(self.count, device=self.device)
        self.tracker = self.policy.tracker()
        self.coming = ()
        return self.whole(0)

    def whole(self, plane: int) -> Part:
        """All T tokens in the loop, in layers from this plane on."""
        places = torch.arange(self.stored, self.stored + self.count, device=self.device)
        return Part(self.table, places, self.stored + self.count - 1, plane)

    def begin_step(self) -> Part:
        """The active tokens, about to run one more step."""
        self.step += 1
        place = self.policy.cache_rule.place(self.step)
        part = self.still_active(self.planes.of_core(place))
        self.ran[part.places] = self.step
        if self.hides:
            part.visible = self.ran >= place
        return part

    def still_active(self, plane: int) -> Part:
        """The active tokens, in layers from this plane on."""
        places = self.active + self.stored
        last = int(places[-1]) if self.count > 1 else self.stored
        return Part(self.table, places, last, plane)

    def end_step(self, moved: torch.Tensor) -> None:
        """Take the active tokens' new states `[n, D]`."""
        if len(self.active) == self.count:
            self.state = moved
        else:
            self.state = self.state.index_copy(0, self.active, moved)

    def test(self, looked_at: torch.Tensor) -> None:
        """Let tokens leave whose exit test passes on their states `[n, D]` or logits `[n, V]`."""
        assert self.tracker is not None
        settled = self.tracker.settled(looked_at, self.active, self.step)
        leaving, self.active = self.active[settled], self.active[~settled]
        if len(leaving):
            self._stand_in(leaving + self.stored)
        if self.tracker.test.of_logits and self.count == 1 and not len(self.active):
            self.logits = looked_at[0]

    def _stand_in(self, places: torch.Tensor) -> None:
        """Under `latest`, let the last step of tokens that leave stand for the deeper ones."""
        rule = self.policy.cache_rule
        deepest = rule.places(self.policy.num_steps)
        if rule.missing != "latest" or self.step >= deepest:
            return
        own, after, end = (self.planes.of_core(place) for place in (self.step, self.step + 1, deepest + 1))
        target = self.table.entries(after, end, places)
        source = self.table.entries(own, after, places)
        self.table.pool.copy_tokens(source, target.view(-1, *source.shape))

    def leave(self, latent_states: torch.Tensor) -> bool:
        """End the pass, with the tokens' s_r `[T, D]`; returns whether a token is to be chosen next."""
        self.stored += self.count
        self.count = 0
        self.carried = latent_states[-1]
        self.coming = self.request.prompt[self.stored : self.stored + self.chunk]
        return not self.coming

    def choose(self, logits: torch.Tensor) -> Token:
        """The next token, from its logits `[V]`; it enters the loop next."""
        token = self.sampler.choose(logits, int(self.ran[self.stored - 1]))
        self.request.tokens.append(token)
        self.coming = (token.id,)
        return token

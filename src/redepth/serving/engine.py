"""The engine: requests in, tokens out, every request at its own depth. No HTTP and no asyncio.

    engine = Engine(model)
    request = engine.submit(ids, DepthPolicy.resolve(model.config, num_steps=8), Sampling(max_new_tokens=20))
    while engine.has_work:
        for request, token in engine.step():
            ...

One tick is one pass of the core over all tokens that are in the loop, at whichever step each is. Tokens that have done
their steps go through coda and head, and what they chose enters at the next tick.

Shapes: N tokens of a pass, D width, V vocabulary.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from redepth.errors import RedepthError, one_line
from redepth.modeling import DepthPolicy
from redepth.modeling.passes import PassContext, check_length
from redepth.modeling.tokens import check_ids, check_numbers

from .packed import PackedLinears
from .paged import Part, paged_context
from .pool import BLOCK, Planes, Pool, needed_blocks
from .request import FinishReason, Request, Sampling, Token
from .rows import Row, capacity

logger = logging.getLogger(__name__)

PROMPTS_AT_ONCE = 4  # pieces of prompts that may be in the loop together


class Update(NamedTuple):
    """What a tick did for a request: one more token; or None where it ended without one (cancelled, error)."""

    request: Request
    token: Token | None


class Engine:
    """Runs requests. `step` is for one thread at a time; `submit` and `cancel` may be called from any.

    What a request gets does not depend on what runs beside it: greedy tokens are those of `model.generate` with the same
    policy, and sampled ones those of `torch.manual_seed(seed)` before it, near ties apart. Where a cache rule lets
    steps share a place (`ring-N`, `first-R-then-last`), that holds for `prefill_chunk_size=prefill_chunk`.

    Args:
        model: in eval mode, on one device.
        max_rows: how many requests run at a time.
        max_tokens: room in the pool of keys and values, in tokens at the model's default depth and cache rule; deeper ones
            take more of it. A request runs once there is room for all that it can come to.
        prefill_chunk: how many tokens of a prompt enter the loop together.
        pack: on a processor in fp32, hold the linear layers' weights a second time, laid out for products with a few rows.

    Raises:
        RedepthError: for a value out of range, and a model with layers that are recurrent in time.
    """

    def __init__(
        self, model: Any, *, max_rows: int = 16, max_tokens: int = 8192, prefill_chunk: int = 32, pack: bool = True
    ) -> None:
        for name, value in (("max_rows", max_rows), ("max_tokens", max_tokens), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise RedepthError(f"{name} must be at least 1, got {value}")
        config = model.config
        if config.has_lru:
            raise RedepthError(
                "the engine can't run layers that are recurrent in time (RecurrentGemma); use model.generate"
            )
        self.model, self.stack, self.config = model, model.transformer, config
        self.max_rows, self.max_tokens, self.prefill_chunk = max_rows, max_tokens, prefill_chunk
        self.planes = Planes(config)
        self.blocks_per_column = self.planes.count(DepthPolicy.resolve(config))
        blocks = needed_blocks(self.blocks_per_column, max_tokens)
        self.pool = Pool(config, blocks, model.dtype, model.device)
        self.linears = PackedLinears(model if pack else torch.nn.Module())
        self._waiting: deque[Request] = deque()
        self._cancelled: deque[Request] = deque()
        self._rows: list[Row] = []
        outer = [*self.stack.prelude, *self.stack.coda, model.lm_head]
        core = [self.stack.adapter, *self.stack.core_block]
        # In ticks, see `_should_leave`.
        self.patience = parameters_of(outer) // parameters_of(core)
        self.ticks = 0
        self.steps_done = 0
        self.tokens_done = 0

    def submit(self, prompt: Iterable[int], policy: DepthPolicy, sampling: Sampling | None = None) -> Request:
        """Queue a prompt of token ids.

        Raises:
            ValueError: for a prompt, policy or size that can never run; nothing is queued.
        """
        ids = tuple(int(token) for token in prompt)
        if not ids:
            raise RedepthError("the prompt is empty; give at least one token")
        check_ids(torch.tensor(ids), self.config.vocab_size)
        check_length(self.config, len(ids))
        if not policy.is_one_token_at_a_time:
            name = "draft_steps" if policy.wavefront is None else "sampler='wavefront'"
            raise RedepthError(f"{name} is not supported by the engine; leave it out")
        request = Request(ids, policy, sampling if sampling is not None else Sampling())
        needed = self._needed(request)
        if needed > self.pool.blocks:
            tokens = needed * BLOCK // self.blocks_per_column
            raise RedepthError(
                f"the request can come to {tokens} tokens' room in the pool, which has {self.max_tokens}; shorten it, ask for "
                "fewer steps or fewer new tokens, or choose a cache_rule such as ring-4"
            )
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request at the next tick; nothing happens to one that has ended."""
        self._cancelled.append(request)

    @property
    def has_work(self) -> bool:
        return bool(self._rows or self._waiting or self._cancelled)

    @property
    def rows(self) -> int:
        """Requests that are running."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that wait for room."""
        return len(self._waiting)

    @property
    def pool_tokens(self) -> int:
        """Room that rows hold, in the unit of `max_tokens`."""
        return self.pool.used * BLOCK // self.blocks_per_column

    @torch.no_grad()
    def step(self) -> list[Update]:
        """One tick; returns what came of it, in order."""
        updates: list[Update] = []
        self._end_cancelled(updates)
        self._admit()
        if not self._rows:
            return updates
        self.ticks += 1
        try:
            with self.linears.in_use():
                self._enter()
                self._run_core(updates)
                self._leave(updates)
        except Exception as error:
            # It can't be laid to one request: all that were in the pass end, those that wait go on.
            logger.exception("a tick failed; the requests that were running end with an error")
            for row in list(self._rows):
                self._end(row, "error", one_line(error), updates)
        return updates

    def _needed(self, request: Request) -> int:
        return needed_blocks(self.planes.count(request.policy), capacity(self.config, request))

    def _end_cancelled(self, updates: list[Update]) -> None:
        while self._cancelled:
            request = self._cancelled.popleft()
            if request.state == "waiting":
                self._waiting.remove(request)
                request.state, request.finish_reason = "finished", "cancelled"
                updates.append(Update(request, None))
            for row in [row for row in self._rows if row.request is request]:
                self._end(row, "cancelled", None, updates)

    def _admit(self) -> None:
        """Let requests in as they came; none overtakes one that still waits for room."""
        while self._waiting and len(self._rows) < self.max_rows and self.pool.promise(self._needed(self._waiting[0])):
            request = self._waiting.popleft()
            request.state = "running"
            self._rows.append(Row(request, self.config, self.pool, self.prefill_chunk))

    def _end(
        self, row: Row, reason: FinishReason, error: str | None = None, updates: list[Update] | None = None
    ) -> None:
        """Give back what a row holds; with `updates`, say so there."""
        row.table.give_back()
        self._rows.remove(row)
        request = row.request
        request.state, request.finish_reason, request.error = "finished", reason, error
        if updates is not None:
            updates.append(Update(request, None))

    def _guarded(self, row: Row, updates: list[Update], act: Callable[..., Any], *arguments: Any) -> Any:
        """Do something for one row; a fault there ends that request alone, and gives None."""
        try:
            return act(*arguments)
        except Exception as error:
            self._end(row, "error", one_line(error), updates)
            return None

    def _context(
        self, parts: list[Part], layers: int, first_layer: int, continued: torch.Tensor | None = None
    ) -> PassContext:
        return paged_context(self.config, self.pool, parts, layers, first_layer, continued)

    def _enter(self) -> None:
        """The prelude, for tokens that enter the loop."""
        entering: list[Row] = []
        room = PROMPTS_AT_ONCE * self.prefill_chunk - sum(row.prompt_tokens for row in self._rows)
        for row in self._rows:
            if row.coming and row.in_prompt:
                # Pieces of prompts enter in the order of their requests, as far as there is room.
                if room >= len(row.coming):
                    entering.append(row)
                room -= len(row.coming)
            elif row.coming:
                entering.append(row)
        if not entering:
            return
        entering.sort(key=lambda row: len(row.coming) > 1)
        ids = torch.tensor([[token for row in entering for token in row.coming]], device=self.pool.keys.device)
        follows = [not row.in_prompt for row in entering]
        context = self._context([row.enter() for row in entering], self.planes.prelude, 0)
        embedded = self.stack.run_prelude(self.stack.embed(ids), context)
        counts = [row.count for row in entering]
        by_row = zip(entering, follows, embedded[0].split(counts), context.position_ids[0].split(counts), strict=True)
        for row, follows_one, e, positions in by_row:
            row.embedded = e
            if row.policy.continuous_compute and follows_one:
                assert row.carried is not None
                row.state, row.starts_fresh = row.carried[None], False
            else:
                s_0 = self.stack.initial_state(e[None], positions[None], row.policy.state_seed)
                row.state, row.starts_fresh = s_0[0], True

    def _run_core(self, updates: list[Update]) -> None:
        """One step for every active token, and the exit tests."""
        running = [row for row in self._rows if len(row.active)]
        if not running:
            return
        running.sort(key=lambda row: len(row.active) > 1)
        embedded = torch.cat([row.embedded[row.active] if row.count > 1 else row.embedded for row in running])[None]
        state = torch.cat([row.state[row.active] if row.count > 1 else row.state for row in running])[None]
        parts = [row.begin_step() for row in running]
        counts = [len(row.active) for row in running]
        past_first = [row.step > 1 or not row.starts_fresh for row in running for _ in range(len(row.active))]
        continued = torch.tensor([past_first], device=state.device)
        context = self._context(parts, self.planes.core, self.planes.prelude, continued)
        # Only a first step is unlike the others, and `continued` tells which tokens are past it.
        moved = self.stack.step(embedded, state, context, 1)[0].split(counts)
        self.steps_done += sum(counts)
        for row, states in zip(running, moved, strict=True):
            row.end_step(states)
            if row.step == row.policy.num_steps:
                row.active = row.active[:0]
        self._test([(row, states) for row, states in zip(running, moved, strict=True) if len(row.active)], updates)

    def _test(self, running: list[tuple[Row, torch.Tensor]], updates: list[Update]) -> None:
        """Let tokens leave the loop whose own test says so; `running` has the rows with their states `[n, D]`."""
        tested = [(row, states, row.tracker.test.of_logits) for row, states in running if row.tracker is not None]
        of_logits = [(row, states) for row, states, reads_logits in tested if reads_logits]
        if of_logits:
            parts = [row.still_active(self.planes.prelude) for row, _ in of_logits]
            context = self._context(parts, self.planes.coda, self.planes.prelude + self.planes.core)
            logits = self.model.read_logits(torch.cat([states for _, states in of_logits])[None], context)[0]
            read = iter(logits.split([len(states) for _, states in of_logits]))
        for row, states, reads_logits in tested:
            self._guarded(row, updates, row.test, next(read) if reads_logits else states)

    def _should_leave(self, ready: list[Row]) -> bool:
        """Whether to run coda and head now, and not to wait a little for more rows to share them.

        They cost the same for one row as for a few. So they wait until a quarter of all rows are ready, but no longer than
        it takes to run them and the prelude once.
        """
        if 4 * len(ready) >= len(self._rows) or any(row.waited >= self.patience for row in ready):
            return bool(ready)
        for row in ready:
            row.waited += 1
        return False

    def _leave(self, updates: list[Update]) -> None:
        """Coda and head for the rows that are done, and the choice of their next tokens."""
        leaving = [row for row in self._rows if row.is_ready]
        if not self._should_leave(leaving):
            return
        leaving.sort(key=lambda row: row.count > 1)
        parts = [row.whole(self.planes.prelude) for row in leaving]
        context = self._context(parts, self.planes.coda, self.planes.prelude + self.planes.core)
        latent_states, hidden = self.stack.run_coda(torch.cat([row.state for row in leaving])[None], context)
        counts = [row.count for row in leaving]
        by_row = zip(leaving, latent_states[0].split(counts), hidden[0].split(counts), strict=True)
        last = [(row, hidden_of_row[-1]) for row, latents, hidden_of_row in by_row if row.leave(latents)]
        if not last:
            return
        logits = self.model.logits(torch.stack([hidden_of_row for _, hidden_of_row in last]))
        for (row, _), logits_of_row in zip(last, logits, strict=True):
            token = self._guarded(row, updates, self._choose, row, logits_of_row)
            if token is not None:
                updates.append(Update(row.request, token))

    def _choose(self, row: Row, logits: torch.Tensor) -> Token:
        check_numbers(logits)
        token = row.choose(logits)
        self.tokens_done += 1
        request, sampling = row.request, row.request.sampling
        stop_ids = end_tokens(self.model) if sampling.stop_ids is None else sampling.stop_ids
        if token.id in stop_ids:
            self._end(row, "stop")
        elif len(request.tokens) == sampling.max_new_tokens or row.stored == self.config.block_size:
            self._end(row, "length")
        return token


def end_tokens(model: Any) -> tuple[int, ...]:
    """The model's own end-of-text tokens, as `generate` takes them."""
    given = model.generation_config.eos_token_id
    if given is None:
        given = model.config.eos_token_id
    return () if given is None else tuple(given) if isinstance(given, list) else (given,)


def parameters_of(modules: Iterable[Any]) -> int:
    """How many parameters some modules have."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())

"""The engine: requests in, tokens out, every request at its own depth. No HTTP and no asyncio.

engine = Engine(model)
request = engine.submit(ids, DepthPolicy.resolve(model.config, num_steps=8), Sampling(max_new_tokens=20))
while engine.has_work:
    for request, token in engine.step():
        ...
"""

from collections import deque
from typing import Any, NamedTuple

import torch

from redepth.errors import RedepthError, one_line
from redepth.modeling import DepthPolicy
from redepth.modeling.passes import check_length
from redepth.modeling.tokens import check_ids, check_numbers

from .request import FinishReason, Request, Sampling, Token
from .sampling import Sampler


class Update(NamedTuple):
    """What a tick did for a request: one more token; or None where it ended without one (cancelled, error)."""

    request: Request
    token: Token | None


class Engine:
    """Runs requests. `step` is for one thread; `submit` and `cancel` may be called from any.

    Args:
        model: in eval mode, on one device.
        max_rows: how many requests run at a time.
        max_tokens: room in the pool of keys and values, in tokens at the model's default depth and cache rule.
        prefill_chunk: how many tokens of a prompt enter the loop together.

    Raises:
        RedepthError: for a value out of range, and a model with layers that are recurrent in time.
    """

    def __init__(self, model: Any, *, max_rows: int = 16, max_tokens: int = 8192, prefill_chunk: int = 32) -> None:
        for name, value in (("max_rows", max_rows), ("max_tokens", max_tokens), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise RedepthError(f"{name} must be at least 1, got {value}")
        if model.config.has_lru:
            raise RedepthError(
                "the engine can't run layers that are recurrent in time (RecurrentGemma); use model.generate"
            )
        self.model = model
        self.max_rows, self.max_tokens, self.prefill_chunk = max_rows, max_tokens, prefill_chunk
        self._waiting: deque[Request] = deque()
        self._cancelled: set[Request] = set()
        self._current: tuple[Request, Any, Sampler, torch.Tensor] | None = None
        self.steps_done = 0
        self.tokens_done = 0

    def submit(self, prompt: Any, policy: DepthPolicy, sampling: Sampling | None = None) -> Request:
        """Queue a prompt of token ids.

        Raises:
            ValueError: for a prompt, policy or size that can never run; nothing is queued.
        """
        ids = tuple(int(token) for token in prompt)
        if not ids:
            raise RedepthError("the prompt is empty; give at least one token")
        check_ids(torch.tensor(ids), self.model.config.vocab_size)
        check_length(self.model.config, len(ids))
        if not policy.is_one_token_at_a_time:
            name = "draft_steps" if policy.wavefront is None else "sampler='wavefront'"
            raise RedepthError(f"{name} is not supported by the engine; leave it out")
        request = Request(ids, policy, sampling or Sampling())
        self._waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """End a request at the next tick; nothing happens to one that has ended."""
        self._cancelled.add(request)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting) or self._current is not None

    @property
    def rows(self) -> int:
        """Requests that are running."""
        return int(self._current is not None)

    @property
    def waiting(self) -> int:
        """Requests that wait for room."""
        return len(self._waiting)

    @property
    def pool_tokens(self) -> int:
        """Room in use, in the unit of `max_tokens`."""
        return 0

    @torch.no_grad()
    def step(self) -> list[Update]:
        """One tick; returns what came of it, in order."""
        updates = []
        if self._current is None and self._waiting:
            request = self._waiting.popleft()
            request.state = "running"
            sampler = Sampler(request.sampling, self.model.device)
            self._current = (request, None, sampler, torch.tensor([request.prompt], device=self.model.device))
        if self._current is None:
            return []
        request, cache, sampler, ids = self._current
        if request in self._cancelled:
            return [self._finish("cancelled")]
        try:
            output = self.model(ids, past_key_values=cache, policy=request.policy, use_cache=True, logits_to_keep=1)
            check_numbers(output.logits)
            steps = output.stats["num_steps"]
            token = sampler.choose(output.logits[0, -1], steps if isinstance(steps, int) else int(steps[0, -1]))
        except ValueError as error:
            return [self._finish("error", one_line(error))]
        self.steps_done += token.steps
        self.tokens_done += 1
        request.tokens.append(token)
        updates.append(Update(request, token))
        stop_ids = request.sampling.stop_ids
        if stop_ids is None:
            stop_ids = end_tokens(self.model)
        length = len(request.prompt) + len(request.tokens)
        if token.id in stop_ids:
            self._finish("stop")
        elif len(request.tokens) == request.sampling.max_new_tokens or length > self.model.config.block_size:
            self._finish("length")
        else:
            new = torch.tensor([[token.id]], device=self.model.device)
            self._current = (request, output.past_key_values, sampler, new)
        return updates

    def _finish(self, reason: FinishReason, error: str | None = None) -> Update:
        assert self._current is not None
        request = self._current[0]
        request.state, request.finish_reason, request.error = "finished", reason, error
        self._current = None
        self._cancelled.discard(request)
        return Update(request, None)


def end_tokens(model: Any) -> tuple[int, ...]:
    """The model's own end-of-text tokens, as `generate` takes them."""
    given = model.generation_config.eos_token_id
    if given is None:
        given = model.config.eos_token_id
    return () if given is None else tuple(given) if isinstance(given, list) else (given,)

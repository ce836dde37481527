"""redepth in lm-eval: its model class for a depth, or for many depths in one pass.

`import redepth` registers `RedepthLM` as `redepth`; `python -m redepth.evaluation` is lm-eval's own command with it.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.utils import get_rolling_token_windows
from transformers import StoppingCriteria, StoppingCriteriaList

from redepth.checkpoint.load import load
from redepth.errors import RedepthError
from redepth.modeling import DepthPolicy, RecurrentDepthForCausalLM
from redepth.modeling.errors import UserError
from redepth.modeling.policy import take_policy_keywords
from redepth.runtime import choose_device

from .answers import Answer, Answers, key_of

DRAFTED_FROM = 8  # steps; the draft has one for each so many
MORE_TOKENS = 2
# (the strings that were asked about, ids of the context, ids of the continuation)
TokenRequest = tuple[Any, list[int], list[int]]


@dataclass
class Cost:
    """What some documents took: tokens run, and steps summed over them."""

    tokens: int = 0
    token_steps: float = 0.0

    def add(self, answer: Answer) -> None:
        self.tokens += answer.tokens
        self.token_steps += answer.tokens * answer.mean_steps


class SharedPass:
    """Logits of one batch at growing depths: prelude and earlier steps are run once."""

    def __init__(self, model: RecurrentDepthForCausalLM, ids: torch.Tensor, state_seed: int | None) -> None:
        self.ids = ids
        self.step = 0
        self._model = model
        self._states = model.states_by_step(ids, model.config.max_num_steps, state_seed=state_seed)
        self._state = next(self._states)

    def logits(self, num_steps: int) -> torch.Tensor:
        """`[B, T, V]` after `num_steps` steps, no fewer than at the last call."""
        while self.step < num_steps:
            self._state = next(self._states)
            self.step += 1
        logits = self._model.predict_from_latents(self._state).logits
        assert logits is not None
        return logits


class RowStops(StoppingCriteria):
    """Ends each row by itself at the first of some texts, so that rows may advance at their own pace.

    Args:
        start: tokens of the prompts, padding included.
    """

    def __init__(self, tokenizer: Any, stops: list[str], start: int) -> None:
        self._tokenizer, self._stops, self._start = tokenizer, stops, start
        tokens = (len(tokenizer.encode(stop, add_special_tokens=False)) for stop in stops)
        # A text may be made of other tokens than the tokenizer would use.
        self._look_back = max(tokens, default=0) + MORE_TOKENS

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """`[B]`, bool, of rows `[B, tokens]`."""
        ended = [self._ends(row) for row in input_ids[:, self._start :].tolist()]
        return torch.tensor(ended, device=input_ids.device)

    def _ends(self, made: list[int]) -> bool:
        text = self._tokenizer.decode(made[-self._look_back :])
        return any(stop in text for stop in self._stops)

    def first(self, made: list[int]) -> int:
        """After how many tokens a row ended; all of them where no text ended it."""
        return next((count for count in range(1, len(made) + 1) if self._ends(made[:count])), len(made))


def drafted(policy: DepthPolicy, config: Any) -> DepthPolicy:
    """The policy for greedy texts: a deep fixed one with drafts of an eighth of its depth, which say the same."""
    if policy.num_steps < DRAFTED_FROM or policy.test is not None or not policy.is_one_token_at_a_time:
        return policy
    if policy.continuous_compute:
        return policy
    try:
        return DepthPolicy.resolve(
            config,
            num_steps=policy.num_steps,
            draft_steps=policy.num_steps // DRAFTED_FROM,
            cache_rule=policy.cache_rule.name,
            state_seed=policy.state_seed,
        )
    except UserError:  # a cache rule that drafts would spoil
        return policy


class RedepthLM(HFLM):
    """A depth-recurrent checkpoint, or for comparison any causal language model, under lm-eval.

    Args:
        pretrained: folder or hub id of a recurrent checkpoint, loaded by `redepth.load`; or a model.
        device: `auto` takes a GPU where there is one.
        kwargs: how deep to go, by the keywords of `DepthPolicy.resolve` (`num_steps`, `criterion`, …); the rest is
            HFLM's.

    Attributes:
        policy: how deep the next answers go; None for a model without a loop.
        policies: all that are asked for. Likelihoods are computed for all of them at once, and kept in `answers`.
        answers: where answers are kept; None for a plain run of lm-eval.
        identity: what keeps one model's answers from another's.
        costs: of the answers since it was last emptied, by task.
        on_batch: called with (kind of request, done, in all) for the policy being run.
    """

    def __init__(self, pretrained: Any, device: str | None = "auto", **kwargs: Any) -> None:
        keywords = take_policy_keywords(kwargs)
        super().__init__(pretrained, device=str(choose_device(device or "auto")), **kwargs)
        self.policy: DepthPolicy | None = None
        if isinstance(self.model, RecurrentDepthForCausalLM):
            self.policy = DepthPolicy.resolve(self.model.config, **keywords)
        elif keywords:
            raise RedepthError(f"a model without a loop in depth takes no {min(keywords)}; leave it out")
        self.policies: list[DepthPolicy | None] = [self.policy]
        self.answers: Answers | None = None
        self.identity = ""
        self.costs: defaultdict[str, Cost] = defaultdict(Cost)
        self.on_batch: Callable[[str, int, int], None] | None = None
        self._shared: SharedPass | None = None
        self._told: list[Answer] = []  # in the order of the requests
        # Of the last pass: its tokens, and with an exit test the steps of each; `[rows, tokens]`.
        self._ids: torch.Tensor | None = None
        self._steps: torch.Tensor | None = None
        # Of the last generation, by row: the tokens that were run, and their mean steps.
        self._ran: list[tuple[int, float | None]] = []

    def set_max_length(self, most: int | None) -> None:
        """How many tokens a request may have; None for what the model reads."""
        self._max_length = most

    def _create_model(self, pretrained: str, revision: str | None = "main", dtype: Any = "auto", **kwargs: Any) -> None:
        wanted = str(dtype).removeprefix("torch.") if dtype is not None else "auto"
        self._model = load(pretrained, wanted, self.device, revision=revision if revision != "main" else None)

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        if self.policy is None:
            return super()._model_call(inps, attn_mask, labels)
        precision = self.mixed_precision_dtype
        self._ids, self._steps = inps, None
        with torch.no_grad(), torch.autocast(self.device.type, precision, enabled=precision is not None):
            if self.policy.test is not None or len(self.policies) == 1:
                output = self.model(inps, policy=self.policy.one_pass())
                if self.policy.test is not None:
                    self._steps = output.stats["num_steps"]
                return output.logits
            shared, seed = self._shared, self.policy.state_seed
            if shared is None or shared.step > self.policy.num_steps or not torch.equal(shared.ids, inps):
                shared = self._shared = SharedPass(self.model, inps, seed)
            return shared.logits(self.policy.num_steps)

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        # As lm-eval reads a task's settings: temperature 0 stands for greedy decoding.
        if kwargs.get("temperature", 0.0) == 0.0 and not kwargs.get("do_sample"):
            kwargs["do_sample"] = False
            kwargs.pop("temperature", None)
        if self.policy is not None:
            greedy = not kwargs.get("do_sample") and (kwargs.get("num_beams") or 1) == 1
            kwargs["policy"] = drafted(self.policy, self.model.config) if greedy else self.policy
        stops = RowStops(self.tokenizer, stop, context.shape[1])
        precision = self.mixed_precision_dtype
        with torch.autocast(self.device.type, precision, enabled=precision is not None):
            output: Any = self.model.generate(
                input_ids=context,
                max_length=max_length,
                stopping_criteria=StoppingCriteriaList([stops]),
                pad_token_id=self.tokenizer.pad_token_id,
                return_dict_in_generate=True,
                **kwargs,
            )
        steps = output["stats"].get("num_steps") if self.policy is not None else None
        ends = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
        self._ran = []
        for row, (made, mask) in enumerate(
            zip(output.sequences[:, context.shape[1] :].tolist(), kwargs["attention_mask"], strict=True)
        ):
            # The last token is made and not run.
            run = next((place for place, token in enumerate(made) if token in ends), len(made) - 1)
            run = min(run, stops.first(made) - 1)
            prompt, padding = int(mask.sum()), int((1 - mask).sum())
            taken = steps[row, padding : padding + prompt + run].float().mean().item() if steps is not None else None
            self._ran.append((prompt + run, taken))
        return output.sequences

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._told = []
        said = super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.answers is not None)
        for request, answer in zip(requests, self._told, strict=False):
            self.costs[request.task_name].add(answer)
        return said

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        self._told = []
        said = super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm or self.answers is not None)
        if self.answers is not None:
            told = iter(self._told)
            for request in requests:
                for _ in self._windows(request.args[0]):
                    self.costs[request.task_name].add(next(told))
        return said

    def _windows(self, text: str) -> list[Any]:
        """As HFLM cuts a text that is longer than the model reads."""
        return list(
            get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
        )

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        if self.answers is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs)
        done = 0
        for batch in self._batches(requests):
            self._answer_batch(batch)
            done += len(batch)
            if self.on_batch is not None:
                self.on_batch("likelihoods", done, len(requests))
        told = [self.answers.get(self._likelihood_key(request)) for request in requests]
        self._told += told
        return [answer.said for answer in told]

    def _batches(self, requests: list[TokenRequest]) -> Iterator[list[TokenRequest]]:
        """The batches that HFLM makes of all requests, whichever of them are answered already.

        So a run that was killed and taken up again has the batches, and the last digits, of an unbroken one.
        """
        same_input = defaultdict(list)
        for request in requests:
            same_input[tuple(input_ids(request))].append(request)
        collator = Collator(
            requests,
            sort_fn=lambda request: (-len(request[1] + request[2]), tuple(request[1] + request[2])),
            group_by="contexts",
            group_fn=input_ids,
        )
        for chunk in collator.get_batched(n=self.batch_size):
            yield [request for chosen in chunk for request in same_input[tuple(input_ids(chosen))]]

    def _answer_batch(self, batch: list[TokenRequest]) -> None:
        """What is not answered yet, at every policy; kept together."""
        assert self.answers is not None
        answering, made = self.policy, []
        try:
            for policy in self.policies:
                self.policy = policy
                todo = [request for request in batch if self.answers.find(self._likelihood_key(request)) is None]
                if not todo:
                    continue
                for request, said in zip(todo, super()._loglikelihood_tokens(todo, disable_tqdm=True), strict=True):
                    ids = input_ids(request)
                    answer = Answer(said, len(ids), self._mean_steps(self._steps_of(ids)))
                    made.append((self._likelihood_key(request), answer))
        finally:
            self.policy, self._shared = answering, None
        self.answers.keep(made)

    def _steps_of(self, ids: list[int]) -> float | None:
        """Mean steps of the tokens of an input in the last pass, where an exit test ran."""
        if self._steps is None:
            return None
        assert self._ids is not None
        wanted = torch.tensor(ids, device=self._ids.device)
        (rows,) = (self._ids[:, : len(ids)] == wanted).all(1).nonzero(as_tuple=True)
        return self._steps[rows[0], : len(ids)].float().mean().item()

    def _mean_steps(self, taken: float | None) -> float:
        if self.policy is None:
            return 0.0
        return float(self.policy.num_steps) if self.policy.test is None or taken is None else taken

    def _likelihood_key(self, request: TokenRequest) -> str:
        return key_of(self.identity, str(self.policy), "likelihood", request[1], request[2])

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        if self.answers is None:
            return super().generate_until(requests, disable_tqdm=disable_tqdm)
        asked: Counter[str] = Counter()
        keys = []
        for request in requests:
            key = key_of(self.identity, str(self.policy), "generate", *request.args)
            asked[key] += 1  # samples of one request differ
            keys.append(f"{key} {asked[key]}")
        collator = Collator(
            [(*request.args, number) for number, request in enumerate(requests)],
            sort_fn=lambda request: (-len(self.tok_encode(request[0])), request[0]),
            group_by="gen_kwargs",
            group_fn=lambda request: request[1],
        )
        done = 0
        for chunk in collator.get_batched(n=self.batch_size):
            todo = [number for *_, number in chunk if self.answers.find(keys[number]) is None]
            if todo:
                said = super().generate_until([requests[number] for number in todo], disable_tqdm=True)
                self.answers.keep(
                    (keys[number], Answer(text, tokens, self._mean_steps(steps)))
                    for number, text, (tokens, steps) in zip(todo, said, self._ran, strict=True)
                )
            done += len(chunk)
            if self.on_batch is not None:
                self.on_batch("texts", done, len(requests))
        told = [self.answers.get(key) for key in keys]
        for request, answer in zip(requests, told, strict=True):
            self.costs[request.task_name].add(answer)
        return [answer.said for answer in told]


def input_ids(request: TokenRequest) -> list[int]:
    """The tokens that are run for a request: its last one is only predicted."""
    return request[1] + request[2][:-1]

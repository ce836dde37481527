"""From logits to tokens: each request by its own settings and its own generator."""

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .request import Sampling, Token


class Sampler:
    """Chooses the tokens of one request, as `generate` does after `torch.manual_seed(seed)`."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling = sampling
        self.warpers = LogitsProcessorList()
        if sampling.temperature not in (0, 1):
            self.warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_k:
            self.warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(sampling.top_p)))
        self.generator = torch.Generator(device).manual_seed(sampling.seed) if sampling.temperature else None

    def choose(self, logits: torch.Tensor, steps: int) -> Token:
        """The next token, from its logits `[V]`, after so many steps.

        Raises:
            ValueError: for logits that are not numbers.
        """
        scores = logits.float()
        if self.generator is None:
            token = int(scores.argmax())
        else:
            # None of the warpers looks at the text so far.
            warped = self.warpers(None, scores[None])  # type: ignore[arg-type]
            weights = warped.softmax(-1)
            token = int(torch.multinomial(weights, 1, generator=self.generator))
        count = self.sampling.logprobs
        if count is None:
            return Token(token, steps)
        logprobs = scores.log_softmax(-1)
        top = logprobs.topk(min(count, len(logprobs)))
        likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Token(token, steps, float(logprobs[token]), likeliest)

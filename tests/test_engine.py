"""The engine: what a request gets does not depend on what runs beside it."""

import torch

from redepth.modeling import DepthPolicy
from redepth.serving.engine import Engine
from redepth.serving.request import Sampling
from redepth.surgery.convert import plan_conversion
from tests.zoo import random_ids


def test_greedy_equals_generate(zoo) -> None:
    model = plan_conversion(zoo["llama"], "0:2", "2:4", "5:6", adapter="blend:0.4", state="noise").model()
    engine = Engine(model)
    prompts = [random_ids(1, length, seed=length)[0] for length in (3, 9)]
    requests = [
        engine.submit(ids.tolist(), DepthPolicy.resolve(model.config, num_steps=r), Sampling(6, stop_ids=()))
        for ids, r in zip(prompts, (2, 5), strict=True)
    ]
    while engine.has_work:
        engine.step()
    for ids, request in zip(prompts, requests, strict=True):
        r = request.policy.num_steps
        wanted = model.generate(ids[None], num_steps=r, max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert [token.id for token in request.tokens] == wanted[0, len(ids) :].tolist()
        assert [token.steps for token in request.tokens] == [r] * 6
        assert request.finish_reason == "length"
    assert torch.is_grad_enabled()

"""The compiled pass of the core: the same numbers as the plain one, and one graph for every depth and length."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from redepth import RecurrentDepthForCausalLM
from redepth.modeling import RecurrentStack, compiled
from redepth.surgery.convert import plan_conversion
from tests.tolerance import tolerance
from tests.zoo import random_ids

CLOSE = tolerance(layers=4 + 2 * 4)
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}


def make(zoo, name: str, state: str = "embed") -> RecurrentDepthForCausalLM:
    return plan_conversion(zoo[name], "0:2", "2:4", "4:6", adapter="blend:0.5", state=state).model()


def logits(model: RecurrentDepthForCausalLM, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Of each generated token, `[B, tokens, V]`."""
    return torch.stack(model.generate(ids, **GREEDY, output_logits=True, pad_token_id=0, **settings).logits, dim=1)


def counted(monkeypatch, run: Callable[..., torch.Tensor]) -> list[int]:
    """Puts `run` in the place of the compiled pass; the list grows by one entry a call."""
    calls: list[int] = []

    def counting(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return run(*arguments)

    monkeypatch.setattr(compiled, "compiled_core_pass", counting)
    return calls


@pytest.mark.parametrize("rule", ["full", "latest", "ring-2", "first-2-then-last", "skip", "latest+ring-2"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_the_cache_as_plain_tensors_equals_the_cache(zoo, monkeypatch, name: str, rule: str) -> None:
    model, ids = make(zoo, name), random_ids(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    settings = {"num_steps": 3, "cache_rule": rule, "attention_mask": mask}
    wanted = logits(model, ids, **settings)
    calls = counted(monkeypatch, compiled.core_pass)
    model.transformer.core_is_compiled = True
    torch.testing.assert_close(logits(model, ids, **settings), wanted, **CLOSE)
    assert len(calls) == 4 * 3  # tokens after the prefill, steps


def test_other_passes_stay_plain(zoo, monkeypatch) -> None:
    """A prefill, a pass without a cache, a criterion and drafts answer as before."""
    model, ids = make(zoo, "llama"), random_ids(2, 6)
    ways = [{"criterion": "latent-diff", "exit_threshold": 0.4}, {"draft_steps": 1}, {"cache_rule": "ring-1"}]
    wanted = [model.generate(ids, num_steps=3, **GREEDY, **way).sequences for way in ways]
    without = model(ids, num_steps=3).logits
    counted(monkeypatch, compiled.core_pass)
    model.transformer.core_is_compiled = True
    for way, sequences in zip(ways, wanted, strict=True):
        assert torch.equal(model.generate(ids, num_steps=3, **GREEDY, **way).sequences, sequences)
    torch.testing.assert_close(model(ids, num_steps=3).logits, without, **CLOSE)


def test_one_graph_for_every_depth_and_length(zoo, monkeypatch) -> None:
    torch._dynamo.reset()
    model, ids = make(zoo, "llama"), random_ids(1, 6)
    wanted = [logits(model, ids, num_steps=steps) for steps in (2, 4)]
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(
        compiled, "compiled_core_pass", torch.compile(compiled.core_pass, dynamic=True, fullgraph=True, backend=counter)
    )
    model.transformer.core_is_compiled = True
    made = []
    for steps, expected in zip((2, 4), wanted, strict=True):
        torch.testing.assert_close(logits(model, ids, num_steps=steps), expected, **CLOSE)
        made.append(counter.frame_count)
    logits(model, random_ids(1, 17), num_steps=3)
    assert made == [counter.frame_count] * 2 and made[0] > 0
    for rows in (2, 3):
        logits(model, random_ids(rows, 6), num_steps=2)
        made.append(counter.frame_count)
    assert made[2] == made[3] == made[0] + 1  # several rows are another graph than one


def test_without_a_compiler_one_line_says_so(zoo, monkeypatch) -> None:
    model, ids, said = make(zoo, "llama"), random_ids(1, 6), []
    wanted = logits(model, ids, num_steps=2)

    def no_compiler(*arguments: Any, **settings: Any) -> Any:
        raise RuntimeError("no g++ here\nand much more")

    monkeypatch.setattr(RecurrentStack, "use_few_token_kernels", lambda stack: False)
    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(compiled.logger, "warning", said.append)
    assert not model.compile_core()
    assert len(said) == 1 and "no g++ here" in said[0] and "\n" not in said[0]
    torch.testing.assert_close(logits(model, ids, num_steps=2), wanted, **CLOSE)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("rows", [1, 3])
def test_the_compiled_pass_equals_the_plain_one(zoo, rows: int) -> None:
    torch._dynamo.reset()
    model, ids = make(zoo, "llama"), random_ids(rows, 6)
    wanted = logits(model, ids, num_steps=3)
    model.transformer.core_is_compiled = True
    torch.testing.assert_close(logits(model, ids, num_steps=3), wanted, **CLOSE)

"""Attention that takes masks of its own: flex and flash attention, and weights spread over processes."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import redepth
from redepth.modeling.attention import eager_attention
from redepth.surgery.convert import plan_conversion
from tests.tolerance import tolerance
from tests.zoo import random_ids

STEPS = 3
CLOSE = tolerance(layers=4 + 2 * STEPS)
# Sliding windows, soft caps, and both.
KINDS_OF_MODEL = ("llama", "qwen2", "gemma2")
PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3]])


def flash_stand_in(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, None]:
    """What flash attention computes from what it is handed: padding as `[B, S]` or None, a window, the last T queries."""
    assert attention_mask is None or attention_mask.ndim == 2
    new, stored = query.shape[2], key.shape[2]
    at, seen = torch.arange(stored - new, stored)[:, None], torch.arange(stored)
    allowed = seen <= at
    if sliding_window is not None:
        allowed = allowed & (seen > at - sliding_window)
    allowed = allowed.expand(len(query), 1, new, stored)
    if attention_mask is not None:
        allowed = allowed & attention_mask[:, None, None, -stored:].bool()
    return eager_attention(module, query, key, value, allowed, scaling, dropout, softcap)[0], None


@pytest.fixture(params=("flex_attention", "flash_attention_2"))
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    # A processor has no flash attention, and compiles flex attention for minutes.
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash_stand_in)
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        yield request.param


def both(name: str, zoo: dict[str, Path], kind: str) -> tuple[Any, Any]:
    """The same model with a kind of attention of its own, and with the eager one."""
    models = []
    for implementation in (kind, "eager"):
        model = plan_conversion(zoo[name], core="2:4", adapter="random", state="zeros").model().eval()
        if implementation == "flash_attention_2":
            model.config._attn_implementation = implementation  # the door would ask for the package
        else:
            model.set_attn_implementation(implementation)
        models.append(model)
    return models[0], models[1]


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize("name", KINDS_OF_MODEL)
def test_the_same_logits_and_texts(name: str, kind: str, zoo: dict[str, Path]) -> None:
    model, eager = both(name, zoo, kind)
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    asked: dict[str, Any]
    for asked in ({}, {"attention_mask": mask}):
        real = mask.bool() if asked else torch.ones_like(mask).bool()
        logits = [one(ids, num_steps=STEPS, **asked).logits[real] for one in (model, eager)]
        torch.testing.assert_close(*logits, **CLOSE)
        texts = [
            one.generate(ids, num_steps=STEPS, max_new_tokens=5, do_sample=False, **asked) for one in (model, eager)
        ]
        assert torch.equal(*texts)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile.*")
@pytest.mark.parametrize("name", KINDS_OF_MODEL)
def test_where_masks_must_be_written_out_another_kind_stands_in(name: str, kind: str, zoo: dict[str, Path]) -> None:
    """Exits by token, rows at different places, hidden tokens, packed documents, a mask of one's own."""
    model, eager = both(name, zoo, kind)
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    passes: list[dict[str, Any]] = [
        {"criterion": "latent-diff", "exit_threshold": 0.3, "attention_mask": mask},
        {"cache_rule": "skip", "criterion": "cosine", "attention_mask": mask},
        {"position_ids": PACKED.expand(2, -1)},
        {"position_ids": PACKED.expand(2, -1), "use_cache": False},
    ]
    if eager.config.layer_types is None:
        passes.append({"attention_mask": torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()})
    for asked in passes:
        outputs = [one(ids, num_steps=STEPS, **asked) for one in (model, eager)]
        real = (
            asked["attention_mask"].bool()
            if asked.get("attention_mask", PACKED).ndim == 2 and "criterion" in asked
            else ...
        )
        torch.testing.assert_close(outputs[0].logits[real], outputs[1].logits[real], **CLOSE)
    drafted = {"num_steps": STEPS, "draft_steps": 1, "max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **drafted), eager.generate(ids, **drafted))


@pytest.mark.slow
def test_tensor_parallel_on_two_processes(zoo: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    redepth.convert(zoo["llama"], folder, core="2:4", adapter="random", state="zeros")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.tensor_parallel_on_cpu", folder], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr

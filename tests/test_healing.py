"""Healing: data, curriculum, resume, gradients, and the record it leaves."""

import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import redepth
from redepth.checkpoint.folder import read_recipe
from redepth.data.mixture import training_and_held_out
from redepth.data.python_docs import python_docs
from redepth.data.rows import Place, encode, rows_of
from redepth.data.text import open_text
from redepth.errors import RedepthError
from redepth.evaluation.loss import loss_by_depth
from redepth.healing.curriculum import depth_of_step, learning_rate_factor, mean_recurrence
from redepth.healing.heal import heal
from redepth.healing.preflight import check_gradients
from redepth.healing.recipe import HealRecipe, read_heal_recipe
from redepth.healing.trainer import HealTrainer
from redepth.runtime import keep_freed_memory
from redepth.surgery.create import create
from redepth.surgery.presets import preset_config
from tests.zoo import VOCABULARY, random_ids

SHORT = {
    "sequence_length": 16,
    "batch_size": 4,
    "micro_batch_size": 2,
    "max_steps": 6,
    "eval_rows": 3,
    "learning_rate": 1e-3,
    "mean_recurrence": 3.0,
    "precision": "fp32",
    "eval_depths": (1, 4),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of single letters that fits the zoo's vocabulary."""
    letters = {chr(32 + i): i + 3 for i in range(VOCABULARY - 6)}
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2, **letters, "?!": 98}, unk_token="?!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", bos_token="<s>")


@pytest.fixture
def source(zoo, tmp_path: Path) -> Path:
    """A tiny source with a tokenizer."""
    import shutil

    shutil.copytree(zoo["qwen3"], tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture
def checkpoint(source: Path, tmp_path: Path) -> Path:
    redepth.convert(source, tmp_path / "recurrent", core="2:4")
    return tmp_path / "recurrent"


def test_heal_lowers_the_loss_and_records_it(checkpoint: Path, tmp_path: Path) -> None:
    simple = tmp_path / "simple.jsonl"
    simple.write_text('{"text": "over and over and over "}\n' * 50)
    records = []
    recipe = HealRecipe(**SHORT | {"max_steps": 30, "data": str(simple)})
    healing = heal(checkpoint, recipe, on_progress=records.append)
    assert all(healing.loss_after[depth] < healing.loss_before[depth] - 0.1 for depth in (1, 4))
    assert {record.part for record in records} == {"loss before", "training", "loss after"}
    assert not (checkpoint / "healing").exists()
    assert json.loads((checkpoint / "healing.json").read_text())["tokens"] == 30 * 4 * 16
    assert read_recipe(checkpoint)["heal"]["max_steps"] == 30
    assert "Held-out loss" in (checkpoint / "README.md").read_text()
    model = redepth.load(checkpoint)
    assert model.config.mean_recurrence == 3
    with pytest.raises(RedepthError, match="healed already"):
        heal(checkpoint, HealRecipe(**SHORT))
    assert redepth.verify(checkpoint).checks[-1].verdict == "reported"


def test_resumed_run_equals_the_unbroken_one(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = HealRecipe(**SHORT | {"save_every": 2})
    unbroken = heal(checkpoint, recipe, out=tmp_path / "unbroken")
    broken = HealTrainer.compute_loss

    def killed(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return broken(self, *args, **kwargs)

    monkeypatch.setattr(HealTrainer, "compute_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        heal(checkpoint, recipe, out=tmp_path / "resumed")
    assert [entry.name for entry in (tmp_path / "resumed").iterdir()] == ["healing"]
    monkeypatch.setattr(HealTrainer, "compute_loss", broken)
    with pytest.raises(RedepthError, match="another recipe"):
        heal(checkpoint, HealRecipe(**SHORT | {"learning_rate": 1e-4}), out=tmp_path / "resumed")
    resumed = heal(checkpoint, recipe, out=tmp_path / "resumed")
    assert resumed.loss_before == unbroken.loss_before
    for depth, loss in unbroken.loss_after.items():
        assert abs(resumed.loss_after[depth] - loss) < 1e-6


def test_fresh_models_can_be_trained_too(source: Path, tmp_path: Path) -> None:
    create(preset_config("nano", vocab_size=VOCABULARY), tmp_path / "new", byte_tokenizer(), torch.bfloat16)
    (tmp_path / "new" / "README.md").write_text("# mine\n")
    healing = heal(tmp_path / "new", HealRecipe(**SHORT))
    assert healing.loss_after[4] < healing.loss_before[4]
    assert redepth.load(tmp_path / "new").dtype == torch.bfloat16
    assert (tmp_path / "new" / "README.md").read_text() == "# mine\n"
    with pytest.raises(RedepthError, match="no source to compare"):
        redepth.verify(tmp_path / "new")


def test_same_seed_same_run(checkpoint: Path, tmp_path: Path) -> None:
    first, second = (heal(checkpoint, HealRecipe(**SHORT), out=tmp_path / name) for name in ("a", "b"))
    assert first.loss_after == second.loss_after


def test_time_ends_a_run(checkpoint: Path) -> None:
    healing = heal(checkpoint, HealRecipe(**SHORT | {"max_steps": 100_000, "max_minutes": 0.02}))
    assert 1 <= healing.steps < 10_000


def test_parameter_without_gradient_stops_the_run(checkpoint: Path) -> None:
    model = redepth.load(checkpoint)
    model.register_parameter("spare", torch.nn.Parameter(torch.zeros(3)))
    model(tokens := random_ids(1, 16), labels=tokens, num_steps=2).loss.backward()
    with pytest.raises(RedepthError, match="'spare'"):
        check_gradients(model)


def test_loss_by_depth_equals_separate_passes(checkpoint: Path) -> None:
    model, tokens = redepth.load(checkpoint), random_ids(5, 12)
    losses = loss_by_depth(model, tokens, (1, 3), batch_size=2)
    for depth, loss in losses.items():
        with torch.no_grad():
            assert abs(model(tokens, labels=tokens, num_steps=depth).loss.item() - loss) < 1e-5


def documents_of(*texts: str) -> Iterator[tuple[Place, list[int]]]:
    tokenizer = byte_tokenizer()
    return ((Place(0, number), encode(text, tokenizer)) for number, text in enumerate(texts))


def test_rows_hold_every_token_in_order() -> None:
    rows = list(rows_of(documents_of("abc", "defghij", "", "klmno"), 4))
    tokens = [token for ids, _, _ in rows for token in ids]
    assert byte_tokenizer().decode(tokens) == "abc</s>defghij</s></s>klm"
    assert [positions for _, positions, _ in rows] == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 0, 1, 2]]
    assert [tuple(place) for _, _, place in rows] == [(0, 1, 0), (0, 1, 4), (0, 2, 0), (0, 3, 3)]


@pytest.mark.parametrize("ending", ["txt", "jsonl", "parquet"])
def test_local_data(tmp_path: Path, ending: str) -> None:
    texts = [f"document number {i} of these" for i in range(20)]
    file = tmp_path / f"data.{ending}"
    if ending == "txt":
        file.write_text("\n".join(texts))
    elif ending == "jsonl":
        file.write_text("\n".join(json.dumps({"body": text, "id": i}) for i, text in enumerate(texts)))
    else:
        from datasets import Dataset

        Dataset.from_dict({"body": texts, "id": list(range(20))}).to_parquet(file)
    documents = [row["text"] for row in open_text(str(file), "text" if ending == "txt" else "body")]
    assert documents == (["\n".join(texts)] if ending == "txt" else texts)


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({"text": chr(65 + i) * 10}) for i in range(20)))
    recipe = HealRecipe(data=str(file), sequence_length=8, eval_rows=3)
    training, held_out = training_and_held_out(byte_tokenizer(), recipe)
    seen = {token for row, _ in zip(training, range(60), strict=False) for token in row["input_ids"].tolist()}
    assert held_out.shape == (3, 8)
    assert seen & set(held_out.flatten().tolist()) == {2}  # the end-of-text token


def first_rows(recipe: HealRecipe, count: int) -> list[list[int]]:
    training, _ = training_and_held_out(byte_tokenizer(), recipe)
    return [row["input_ids"].tolist() for row, _ in zip(training, range(count), strict=False)]


def test_python_docs_are_split_and_repeatable() -> None:
    training, held_out = python_docs(), python_docs(held_out=True)
    assert not set(training) & set(held_out)
    assert len(training) > 10 * len(held_out) > 0
    assert training == python_docs()
    recipe = HealRecipe(sequence_length=32, eval_rows=1, seed=1)
    assert first_rows(recipe, 5) == first_rows(recipe, 5)


@pytest.mark.parametrize(
    ("data", "column", "message"),
    [
        ("missing.jsonl", "text", "does not exist"),
        ("nobody/nothing", "text", "could not be loaded"),
        ("{folder}", "text", "datasets id"),
        ("{folder}/data.jsonl", "body", "no column 'body', only text"),
    ],
)
def test_bad_data(tmp_path: Path, data: str, column: str, message: str) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(RedepthError, match=message):
        open_text(data.format(folder=tmp_path), column)


def test_schedules() -> None:
    recipe = HealRecipe(mean_recurrence=9, curriculum="linear", curriculum_fraction=0.5, warmup=0.1, decay=0.2)
    assert [mean_recurrence(recipe, progress) for progress in (0, 0.25, 0.5, 1)] == [1, 5, 9, 9]
    assert [round(learning_rate_factor(recipe, progress), 6) for progress in (0.05, 0.5, 0.9, 1)] == [0.5, 1, 0.5, 0]
    slow = HealRecipe(mean_recurrence=9, curriculum="one-minus-sqrt", curriculum_fraction=1)
    assert mean_recurrence(slow, 0.75) == 5
    assert mean_recurrence(HealRecipe(mean_recurrence=9, curriculum="constant"), 0) == 9
    assert depth_of_step(recipe, 7, 0.9) == depth_of_step(recipe, 7, 0.9)
    fixed = recipe.model_copy(update={"depth_sampling": "fixed", "curriculum": "constant", "mean_recurrence": 5.0})
    assert {depth_of_step(fixed, step, 0.9) for step in range(9)} == {
        (max(5 - recipe.backprop_depth, 0), min(5, recipe.backprop_depth))
    }
    assert len({depth_of_step(recipe, step, 0.9) for step in range(20)}) > 3


def test_flags_go_over_the_file_and_mistakes_are_named(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("heal: {max_steps: 7, seed: 3}\n")
    recipe = read_heal_recipe(file, max_steps=9, seed=None)
    assert (recipe.max_steps, recipe.seed, recipe.batch_size) == (9, 3, HealRecipe().batch_size)
    for content, message in (
        ("heal: {max_step: 7}", "max_step"),
        ("heal: {curriculum: steep}", "curriculum = 'steep'"),
        ("max_steps: 3", "no section 'heal'"),
        ("heal: {batch_size: 6, micro_batch_size: 4}", "multiple"),
        ("heal: [", "not valid YAML"),
    ):
        file.write_text(content)
        with pytest.raises(RedepthError, match=message):
            read_heal_recipe(file)
    with pytest.raises(RedepthError, match="does not exist"):
        read_heal_recipe(tmp_path / "nowhere.yaml")


def test_row_longer_than_the_model(checkpoint: Path) -> None:
    with pytest.raises(RedepthError, match="128 tokens the model allows"):
        heal(checkpoint, HealRecipe(**SHORT | {"sequence_length": 256}))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_stays_with_the_process() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    assert keep_freed_memory()
    size = 2**27
    held = torch.ones(size, dtype=torch.uint8)
    before = resident()
    del held
    assert resident() > before - size / 2

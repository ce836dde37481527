"""Healing loses nothing and is not wrong in silence: checked at the start, kept at the end, and healed further."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import redepth
from redepth.checkpoint.folder import read_recipe
from redepth.errors import RedepthError
from redepth.healing import heal as heal_module
from redepth.healing.heal import heal
from redepth.healing.recipe import HealRecipe, read_heal_recipe
from redepth.healing.record import read_healing, runs_of
from redepth.healing.retrofit import read_retrofit_recipe
from redepth.healing.trainer import HealTrainer
from tests.test_healing import SHORT, byte_tokenizer
from tests.test_healing_data import write_letters

QUICK = SHORT | {"max_steps": 3, "eval_depths": (1, 2), "eval_rows": 1, "micro_batch_size": 4}


class _Stop(Exception):
    pass


@pytest.fixture(scope="module")
def converted(zoo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trust")
    shutil.copytree(zoo["llama"], folder / "source")
    byte_tokenizer().save_pretrained(folder / "source")
    redepth.convert(folder / "source", folder / "recurrent", core="2:4")
    return folder / "recurrent"


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "up" / "recurrent"))


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(self: HealTrainer, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a run began that can't be saved")

    monkeypatch.setattr(HealTrainer, "train", train)


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    whole = HealTrainer.compute_loss

    def stopped(self: HealTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise _Stop
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(HealTrainer, "compute_loss", stopped)


def change_tensor(checkpoint: Path, name: str, change: Any) -> None:
    """`change` gets the tensors by name, and works on them in place."""
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    change(tensors, name)
    save_file(tensors, file, metadata={"format": "pt"})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_folder_may_be_named_in_any_way(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`heal .` and `heal up/../up/recurrent` used to train to the end, and then fail or lose the folder."""
    monkeypatch.chdir(checkpoint)
    (checkpoint / ".git").mkdir()
    (checkpoint / ".git" / "HEAD").write_text("mine")
    (checkpoint / "healing").mkdir()
    (checkpoint / "healing" / "notes.txt").write_text("mine too")
    heal(".", HealRecipe(**QUICK))
    assert 'from_pretrained("recurrent"' in (checkpoint / "README.md").read_text()
    assert (checkpoint / ".git" / "HEAD").read_text() == "mine"
    assert [file.name for file in (checkpoint / "healing").iterdir()] == ["notes.txt"]
    assert [entry.name for entry in checkpoint.parent.iterdir()] == ["recurrent"]
    monkeypatch.chdir(checkpoint.parent)
    heal("../up/recurrent", HealRecipe(**QUICK), further=True)
    healing = read_healing(checkpoint)
    assert healing is not None and len(healing.earlier) == 1


def test_what_the_end_needs_is_asked_at_the_start(
    checkpoint: Path, tmp_path: Path, no_training: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    for out, message in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "can't be written"),
        (tmp_path / "full", "already exists"),
        (checkpoint / "inside", "contain one another"),
        (checkpoint.parent, "contain one another"),
    ):
        with pytest.raises(RedepthError, match=message):
            heal(checkpoint, HealRecipe(**QUICK), out=out)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(RedepthError, match="make room first"):
        heal(checkpoint, HealRecipe(**QUICK))
    assert snapshot(tmp_path) == before


def test_healed_further_and_all_of_it_recorded(checkpoint: Path, tmp_path: Path) -> None:
    first = heal(checkpoint, HealRecipe(**QUICK))
    with pytest.raises(RedepthError, match="healed already; --further"):
        heal(checkpoint, HealRecipe(**QUICK))
    old = json.loads((checkpoint / "healing.json").read_text())
    del old["run"], old["earlier"]  # as they were written before runs were counted
    (checkpoint / "healing.json").write_text(json.dumps(old))
    (checkpoint / "evaluation.json").write_text("{}")  # of weights that are about to go
    second = HealRecipe(**QUICK | {"seed": 5, "learning_rate": 1e-4})
    beside = heal(checkpoint, second, out=tmp_path / "beside")
    again = heal(checkpoint, second, further=True)
    assert again.loss_before == pytest.approx(first.loss_after, abs=1e-6)
    assert again.loss_before == pytest.approx(beside.loss_before, abs=1e-6)
    assert again.loss_after == pytest.approx(beside.loss_after, abs=1e-6)
    for folder in (checkpoint, tmp_path / "beside"):
        healing = read_healing(folder)
        assert healing is not None and [run["seed"] for run in runs_of(healing)] == [0, 5]
        assert [run["seed"] for run in read_recipe(folder)["heal"]] == [0, 5]
        assert not (folder / "evaluation.json").exists()
        card = (folder / "README.md").read_text()
        assert "Run 1 of 2: healed on 192 tokens of python-docs" in card and "learning_rate 0.0001" in card
        log = [json.loads(line) for line in (folder / "healing-log.jsonl").read_text().splitlines()]
        steps = [(line.get("run", 1), line["step"]) for line in log if "loss" in line]
        assert steps == [(run, step) for run in (1, 2) for step in (1, 2, 3)]
    file = checkpoint / "recipe.yaml"
    assert [run.seed for run in read_retrofit_recipe(file).heal] == [0, 5]
    with pytest.raises(RedepthError, match="2 runs in its section 'heal'"):
        read_heal_recipe(file)
    with pytest.raises(RedepthError, match="not by flags"):
        read_retrofit_recipe(file, seed=3)


def test_killed_when_all_but_clearing_up_is_done(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(work: Path) -> None:
        raise _Stop

    monkeypatch.setattr(heal_module, "clear", killed)
    with pytest.raises(_Stop):
        heal(checkpoint, HealRecipe(**QUICK))
    monkeypatch.undo()
    assert (checkpoint / "healing" / "before.json").exists()
    written = (checkpoint / "model.safetensors").stat().st_mtime_ns
    assert heal(checkpoint, HealRecipe(**QUICK)) == read_healing(checkpoint)
    assert not (checkpoint / "healing").exists()
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == written


def test_a_checkpoint_that_lacks_a_tensor_is_not_trained(checkpoint: Path, no_training: None) -> None:
    change_tensor(checkpoint, "transformer.adapter.weight", lambda tensors, name: tensors.pop(name))
    before = snapshot(checkpoint)
    with pytest.raises(RedepthError, match=r"lacks tensor 'transformer\.adapter\.weight'"):
        heal(checkpoint, HealRecipe(**QUICK))
    assert snapshot(checkpoint) == before


def test_what_a_run_learns_from_may_not_change_under_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(write_letters(tmp_path, "a"))
    recipe = HealRecipe(**QUICK | {"data": str(data), "save_every": 1})
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(_Stop):
            heal(checkpoint, recipe)
    for file, told in ((data, f"data {str(data)!r}"), (checkpoint / "model.safetensors", "the model in ")):
        content = file.read_bytes()
        file.write_bytes(content[:-2] + b"  ")
        with pytest.raises(RedepthError, match=f"{told}.*changed since the run in .*remove that folder"):
            heal(checkpoint, recipe)
        file.write_bytes(content)
    assert heal(checkpoint, recipe).steps == 3


@pytest.mark.parametrize(
    ("tensor", "value", "message"),
    [
        ("transformer.adapter.weight", math.nan, r"NaN or infinite in tensor 'transformer\.adapter\.weight'"),
        ("transformer.ln_f.weight", 1e38, "held-out loss after 1 steps is (nan|inf) before anything is trained"),
    ],
)
def test_no_numbers_no_run(checkpoint: Path, no_training: None, tensor: str, value: float, message: str) -> None:
    change_tensor(checkpoint, tensor, lambda tensors, name: tensors[name].fill_(value))
    before = snapshot(checkpoint)
    with pytest.raises(RedepthError, match=message):
        heal(checkpoint, HealRecipe(**QUICK))
    assert snapshot(checkpoint) == before


def test_a_run_that_learnt_nothing_is_not_called_healed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, weights = HealTrainer.compute_loss, (checkpoint / "model.safetensors").read_bytes()
    monkeypatch.setattr(HealTrainer, "compute_loss", lambda self, *args, **kwargs: whole(self, *args) * math.nan)
    with pytest.raises(RedepthError, match="all 3 steps were skipped.*nothing is saved as healed"):
        heal(checkpoint, HealRecipe(**QUICK))
    monkeypatch.undo()
    monkeypatch.setattr(heal_module, "_losses", lambda prepared, part: {1: math.nan if "after" in part else 1.0})
    shutil.rmtree(checkpoint / "healing")
    with pytest.raises(RedepthError, match="after 1 steps is nan after the training"):
        heal(checkpoint, HealRecipe(**QUICK))
    assert not (checkpoint / "healing.json").exists()
    assert (checkpoint / "model.safetensors").read_bytes() == weights


def test_a_hub_checkpoint_is_healed_into_a_named_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = heal_module.read_config
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RedepthError, match="'org/name'"):
        heal("org/name", HealRecipe(**QUICK), out=tmp_path / "out")  # no such thing
    fetched = snapshot(checkpoint)
    monkeypatch.setattr(heal_module, "read_config", lambda name: read(checkpoint if name == "org/name" else name))
    monkeypatch.setattr(heal_module, "open_source", lambda name: redepth.checkpoint.sources.open_source(checkpoint))
    with pytest.raises(RedepthError, match="on the hub; name a folder .* with --to"):
        heal("org/name", HealRecipe(**QUICK))
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(_Stop):
            heal("org/name", HealRecipe(**QUICK | {"save_every": 1}), out=tmp_path / "out")
    assert heal("org/name", HealRecipe(**QUICK | {"save_every": 1}), out=tmp_path / "out").steps == 3
    assert snapshot(checkpoint) == fetched
    assert not (tmp_path / "org").exists()
    assert torch.isfinite(redepth.load(tmp_path / "out").transformer["adapter"].weight).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no sections"),
        (b"- a\n- b\n", "no sections"),
        (b"heal:\n", "no section 'heal'"),
        (b"heal: 5\n", "no section 'heal'"),
        (b"heal: []\n", "no section 'heal'"),
        (b"heal: [1, 2]\n", "no section 'heal'"),
        (b"heal: {1: 2}\n", "1"),
        (b"heal: \xff\n", "not UTF-8"),
        (b"heal:\n\tseed: 1\n", "not valid YAML"),
        (b"heal: {seed: 2026-13-45}\n", "not valid YAML|seed"),
        (b"heal: {learning_rate: .inf}\n", "learning_rate = inf"),
        (b"heal: {learning_rate: .nan}\n", "learning_rate = nan"),
        (b"heal: {seed: -1}\n", "seed = -1"),
        (b"heal: {data: []}\n", "data names no source"),
        (b"heal: {data: a.txt, validation: a.txt}\n", "'a.txt' is trained on"),
        (b"heal: {eval_depths: [1000000000]}\n", "none below 1 or above 1024"),
        (b"heal: {mean_recurrence: 1000000000}\n", "mean_recurrence"),
        (b"heal: {text_column: " + b"[" * 50 + b"]" * 50 + b"}\n", "text_column"),
        (b"heal: " + b"[" * 5000, "not valid YAML"),
    ],
)
def test_recipes_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    for read in (read_heal_recipe, read_retrofit_recipe):
        if read is read_retrofit_recipe and content.startswith(b"heal: {"):
            file.write_bytes(b"convert: {source: x}\n" + content)
        with pytest.raises(RedepthError, match=message if read is read_heal_recipe else "recipe.yaml") as said:
            read(file)
        assert "\n" not in str(said.value) and len(str(said.value)) < 400
    with pytest.raises(RedepthError, match="can't be read"):
        read_heal_recipe(tmp_path)

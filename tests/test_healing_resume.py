"""Healing goes on: after kill -9, SIGTERM, a torn checkpoint, and with another number of processes."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import redepth
from redepth.errors import RedepthError
from redepth.healing import heal as heal_module
from redepth.healing.checkpoints import damage, last_whole, seal, sweep
from redepth.healing.heal import HealingInterrupted, heal
from redepth.healing.recipe import HealRecipe, read_heal_recipe
from redepth.healing.trainer import HealTrainer
from redepth.surgery.create import create
from redepth.surgery.presets import preset_config
from tests.test_healing import SHORT, byte_tokenizer

RUN = SHORT | {"max_steps": 30, "save_every": 2, "eval_every": 10, "batch_size": 8, "micro_batch_size": 8}


@pytest.fixture(scope="module")
def converted(zoo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    shutil.copytree(zoo["llama"], folder / "source")
    byte_tokenizer().save_pretrained(folder / "source")
    redepth.convert(folder / "source", folder / "recurrent", core="2:4", state="noise")
    return folder / "recurrent"


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "recurrent"))


def mixture(folder: Path) -> HealRecipe:
    """Two sources of random letters; in rows of one letter no attention matters, and its gradients are rounding alone."""
    letters = random.Random(0)
    sources = []
    for name, weight in (("a", 3), ("b", 1)):
        texts = ["".join(letters.choices("abcdefgh", k=1 + 7 * number % 40)) for number in range(30)]
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append({"data": str(file), "weight": weight})
    return HealRecipe(**RUN | {"data": sources, "sequence_length": 8, "eval_rows": 2})


def write_recipe(recipe: HealRecipe, file: Path) -> Path:
    """JSON is YAML too."""
    content = recipe.model_dump(mode="json", exclude_unset=True)
    file.write_text(json.dumps({"heal": content}))
    return file


def start(checkpoint: Path, recipe: Path, module: str = "redepth", **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, "heal", str(checkpoint), "--recipe", str(recipe)]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment
    )


def start_two(checkpoint: Path, recipe: Path, **options: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    return [start(checkpoint, recipe, RANK=rank, LOCAL_RANK=rank, **shared | options) for rank in "01"]


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def wait_for(process: subprocess.Popen[str], there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 240
    while not there():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def curve(folder: Path) -> list[dict[str, Any]]:
    """Loss by step, and held-out losses."""
    kept = ("step", "loss", "learning_rate", "grad_norm", "held_out_loss_r1", "held_out_loss_r4")
    lines = (folder / "healing-log.jsonl").read_text().splitlines()
    records = [{key: value for key, value in json.loads(line).items() if key in kept} for line in lines]
    return [record for record in records if len(record) > 1]


def assert_same_curve(first: Path, second: Path) -> None:
    got, wanted = curve(first), curve(second)
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def assert_same_losses(first: Path, second: Path) -> None:
    """The losses alone: other batch shapes round otherwise, and Adam makes steps of what is rounding in a gradient."""
    got, wanted = ([record["loss"] for record in curve(folder) if "loss" in record] for folder in (first, second))
    assert got == pytest.approx(wanted, abs=1e-5)


@pytest.fixture(scope="module")
def unbroken(converted: Path, tmp_path_factory) -> Path:
    """The run that nothing interrupts, and its recipe: a mixture, from noise states."""
    folder = tmp_path_factory.mktemp("unbroken")
    recipe = mixture(folder)
    write_recipe(recipe, folder / "recipe.json")
    heal(converted, recipe, out=folder / "out")
    shutil.rmtree(converted / "healing", ignore_errors=True)
    assert [record["step"] for record in curve(folder / "out")] == sorted([*range(1, 31), 10, 20, 30])
    return folder


class _Stop(Exception):
    pass


def run_to(checkpoint: Path, recipe: HealRecipe, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = HealTrainer.compute_loss

    def stopped(self, *args, **kwargs):
        if self.state.global_step == step:
            raise _Stop
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(HealTrainer, "compute_loss", stopped)
    with pytest.raises(_Stop):
        heal(checkpoint, recipe)
    monkeypatch.undo()


def test_killed_run_follows_the_unbroken_one(unbroken: Path, checkpoint: Path) -> None:
    """SIGKILL as soon as a checkpoint is begun: in the middle of writing it, as a rule."""
    recipe, work = unbroken / "recipe.json", checkpoint / "healing"
    process = start(checkpoint, recipe)
    wait_for(process, (work / "checkpoint-6").exists)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert not (checkpoint / "healing.json").exists()
    heal(checkpoint, read_heal_recipe(recipe))
    assert_same_curve(checkpoint, unbroken / "out")
    first, second = (redepth.load(folder).state_dict() for folder in (checkpoint, unbroken / "out"))
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-6


def test_killed_while_the_healed_model_is_put_in_place(unbroken: Path, checkpoint: Path) -> None:
    """Some files are new and some old; the next call finishes what was begun."""
    recipe = read_heal_recipe(unbroken / "recipe.json")
    rename, done = os.replace, []

    def killed(old: Path, new: Path) -> None:
        rename(old, new)
        if Path(new) == checkpoint / "healing.json":
            done.append(new)
            raise _Stop

    (checkpoint / "notes").mkdir()
    (checkpoint / "notes" / "mine.txt").write_text("mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("redepth.checkpoint.folder.os.replace", killed)
        with pytest.raises(_Stop):
            heal(checkpoint, recipe)
    assert done
    assert redepth.load(checkpoint).config.mean_recurrence == round(recipe.mean_recurrence)
    assert_same_curve(checkpoint, unbroken / "out")
    assert f'from_pretrained("{checkpoint.name}"' in (checkpoint / "README.md").read_text()
    assert (checkpoint / "notes" / "mine.txt").read_text() == "mine"
    assert [folder.name for folder in checkpoint.parent.iterdir()] == [checkpoint.name]


def test_sigterm_saves_and_the_same_call_goes_on(
    unbroken: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, whole = read_heal_recipe(unbroken / "recipe.json"), HealTrainer.compute_loss

    def terminated(self, *args, **kwargs):
        if self.state.global_step == 4:
            signal.raise_signal(signal.SIGTERM)
        return whole(self, *args, **kwargs)

    former = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(HealTrainer, "compute_loss", terminated)
    with pytest.raises(HealingInterrupted, match="after step 5.*run the same command again") as stopped:
        heal(checkpoint, recipe)
    monkeypatch.undo()
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == former
    assert damage(checkpoint / "healing" / "checkpoint-5") is None
    heal(checkpoint, recipe)
    assert_same_curve(checkpoint, unbroken / "out")


@pytest.mark.slow  # make test asks the same under FSDP2, below
def test_two_processes_follow_one_and_checkpoints_move_between_them(
    unbroken: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process with 8 rows to step 3, two with 4 each to step 6 or later, one again; gloo on the CPU."""
    recipe, work = read_heal_recipe(unbroken / "recipe.json"), checkpoint / "healing"
    run_to(checkpoint, recipe, 3, monkeypatch)
    processes = start_two(checkpoint, unbroken / "recipe.json")
    wait_for(processes[0], (work / "checkpoint-6" / "run.json").exists)
    for process in processes:
        process.kill()
    assert [finish(process)[0] for process in processes] == [-signal.SIGKILL] * 2
    assert list(work.glob("checkpoint-*/rng_state_1.pth"))
    heal(checkpoint, recipe)
    assert_same_losses(checkpoint, unbroken / "out")


def test_torn_checkpoint_is_passed_over(unbroken: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_heal_recipe(unbroken / "recipe.json")
    run_to(checkpoint, recipe, 7, monkeypatch)
    work = checkpoint / "healing"
    torn = work / "checkpoint-6" / "optimizer.pt"
    torn.write_bytes(torn.read_bytes()[:1000])
    records = []
    heal(checkpoint, recipe, on_progress=records.append)
    told = [record.remark for record in records if "passed over" in record.remark]
    assert told == [told[0]] and "checkpoint-6 has 1,000 of the" in told[0] and "optimizer.pt" in told[0]
    assert_same_curve(checkpoint, unbroken / "out")


def test_full_disk_leaves_the_last_whole_checkpoint(
    unbroken: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, write = read_heal_recipe(unbroken / "recipe.json"), torch.save

    def full(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-6" in str(file):
            Path(file).write_bytes(b"half of it")
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        write(content, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RedepthError, match="checkpoint-6 could not be written.*run the same command again"):
        heal(checkpoint, recipe)
    monkeypatch.undo()
    assert sorted(folder.name for folder in (checkpoint / "healing").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    heal(checkpoint, recipe)
    assert_same_curve(checkpoint, unbroken / "out")


def test_what_counts_as_whole(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "weights").write_bytes(b"12345")
        if step != 8:
            seal(folder, {"elapsed": 1.0})
    (tmp_path / "checkpoint-6" / "inner" / "weights").unlink()
    (tmp_path / "checkpoint-4" / "run.json").write_text('{"elapsed": 1.0, "fil')
    told: list[str] = []
    assert last_whole(tmp_path, told.append) == tmp_path / "checkpoint-2"
    assert [line.partition(",")[0] for line in told] == [
        "checkpoint-8 was not finished",
        "checkpoint-6 lacks inner/weights",
        "checkpoint-4 has an unreadable run.json",
    ]
    sweep(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["checkpoint-2"]


def test_run_killed_after_its_last_step(unbroken: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_heal_recipe(unbroken / "recipe.json")

    def stopped(*args: Any) -> None:
        raise _Stop

    monkeypatch.setattr(heal_module, "_save", stopped)
    with pytest.raises(_Stop):
        heal(checkpoint, recipe)
    monkeypatch.undo()
    healing = heal(checkpoint, recipe)
    assert healing.steps == 30
    assert_same_curve(checkpoint, unbroken / "out")
    losses = json.loads((unbroken / "out" / "healing.json").read_text())["loss_after"]
    assert healing.loss_after == pytest.approx({int(depth): loss for depth, loss in losses.items()}, abs=1e-6)


def test_some_keys_may_change_on_the_way(unbroken: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = read_heal_recipe(unbroken / "recipe.json")
    run_to(checkpoint, recipe, 3, monkeypatch)
    with pytest.raises(RedepthError, match="another recipe, max_steps = 30"):
        heal(checkpoint, recipe.model_copy(update={"max_steps": 40}))
    heal(checkpoint, recipe.model_copy(update={"micro_batch_size": 2, "save_every": 100}))
    assert_same_losses(checkpoint, unbroken / "out")


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def test_fsdp2_follows_one_process_and_resumes(tmp_path: Path) -> None:
    """Sharded weights, optimiser and checkpoints; killed on the way."""
    fresh = tmp_path / "fresh"
    create(preset_config("nano", vocab_size=128), fresh, byte_tokenizer(), torch.float32)
    recipe = mixture(tmp_path)
    file = write_recipe(recipe, tmp_path / "recipe.json")
    heal(fresh, recipe, out=tmp_path / "one")
    processes = start_two(fresh, file, module="tests.fsdp_on_cpu", **FSDP)
    wait_for(processes[0], (fresh / "healing" / "checkpoint-4" / "run.json").exists)
    for process in processes:
        process.kill()
    assert [finish(process)[0] for process in processes] == [-signal.SIGKILL] * 2
    assert list((fresh / "healing").glob("checkpoint-*/optimizer_0/__1_0.distcp"))
    processes = start_two(fresh, file, module="tests.fsdp_on_cpu", **FSDP)
    for process in processes:
        code, _, err = finish(process)
        assert code == 0, err
    assert_same_losses(fresh, tmp_path / "one")
    after = [json.loads((folder / "healing.json").read_text())["loss_after"] for folder in (fresh, tmp_path / "one")]
    assert after[0] == pytest.approx(after[1], abs=5e-3)


@pytest.mark.slow
def test_lora_under_fsdp2_is_refused_at_the_start(tmp_path: Path) -> None:
    """It used to train to the end, and fail when the shards were put together."""
    fresh = tmp_path / "fresh"
    create(preset_config("nano", vocab_size=128), fresh, byte_tokenizer(), torch.float32)
    recipe = HealRecipe(**mixture(tmp_path).model_dump(exclude_unset=True) | {"train": "lora"})
    file = write_recipe(recipe, tmp_path / "recipe.json")
    for process in start_two(fresh, file, module="tests.fsdp_on_cpu", **FSDP):
        code, _, err = finish(process)
        assert code == 2 and "lora can't be sharded by FSDP" in err, err
    assert not (fresh / "healing").exists()


KILLS, INTERRUPTS = 20, 5


@pytest.mark.slow
def test_killed_at_random_moments(unbroken: Path, converted: Path, tmp_path: Path) -> None:
    """SIGKILL at 20 moments and Ctrl-C at 5, each followed by the same command until it is done."""
    recipe, moments = unbroken / "recipe.json", random.Random(0)
    folder = Path(shutil.copytree(converted, tmp_path / "timed"))
    started = time.monotonic()
    assert finish(start(folder, recipe))[0] == 0
    whole = time.monotonic() - started
    for number in range(KILLS + INTERRUPTS):
        signal_ = signal.SIGKILL if number < KILLS else signal.SIGINT
        folder = Path(shutil.copytree(converted, tmp_path / f"run-{number}"))
        process = start(folder, recipe)
        try:
            # The first part of a run is the import of libraries, where there is nothing to lose.
            process.wait(whole * moments.uniform(0.3, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal_)
        code = finish(process)[0]
        assert code in (0, -signal_, 130, 1), f"moment {number} ended with {code}"
        if (folder / "healing").exists() or not (folder / "healing.json").exists():
            code, _, err = finish(start(folder, recipe))
            assert code == 0, f"moment {number}: {err}"
            assert not (folder / "healing").exists() and not (folder / ".redepth").exists()
        assert_same_curve(folder, unbroken / "out")
        shutil.rmtree(folder)

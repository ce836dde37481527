"""The door: what a command can do, a function does with the same arguments."""

import inspect as python_inspect
import json
import shutil
from pathlib import Path

import pytest

import redepth
from redepth import api
from redepth.checkpoint.folder import read_recipe
from redepth.cli import app
from redepth.errors import RedepthError
from tests.test_golden import FOLDER as HUGINN
from tests.test_healing import SHORT, byte_tokenizer

GRIFFIN = Path(__file__).parent / "golden" / "griffin-tiny" / "griffin-tiny.pt"
# What only a person at a terminal needs.
OF_THE_TERMINAL = {"as_json", "quiet", "dry_run"}
VERBS = {"convert": api.convert, "verify": api.verify, "plan": api.plan, "heal": api.heal, "calibrate": api.calibrate}
VERBS |= {
    "retrofit": api.retrofit,
    "eval": api.evaluate,
    "inspect": api.inspect,
    "new": api.create,
    "analyze": api.analyze,
    "publish": api.publish,
}


@pytest.fixture(scope="module")
def source(zoo, tmp_path_factory) -> Path:
    folder = Path(shutil.copytree(zoo["qwen3"], tmp_path_factory.mktemp("api") / "source"))
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(source: Path) -> Path:
    redepth.convert(source, source.parent / "out", core="2:4")
    return source.parent / "out"


@pytest.mark.parametrize("name", VERBS)
def test_a_verb_has_its_commands_arguments_and_defaults(name: str) -> None:
    command = next(one for one in app.registered_commands if one.name == name)
    assert command.callback is not None
    flags = python_inspect.signature(command.callback).parameters
    arguments = python_inspect.signature(VERBS[name]).parameters
    takes_more = any(one.kind is one.VAR_KEYWORD for one in arguments.values())
    for flag, parameter in flags.items():
        if flag in OF_THE_TERMINAL or (takes_more and parameter.kind is parameter.KEYWORD_ONLY):
            continue
        argument = {"adapter": "adapters", "prompt": "prompts"}.get(flag, flag) if name in ("plan", "analyze") else flag
        assert argument in arguments, f"--{flag}"
        same = parameter.default == arguments[argument].default
        # A list that was not given, a path that typer must ask for, and the comparison that a command makes unasked.
        assert same or flag in ("adapter", "prompt", "num_steps", "verify", "out"), f"--{flag}"


def test_what_is_recurrent_already_is_saved_anew(tmp_path: Path) -> None:
    made = redepth.convert(HUGINN, tmp_path / "out", dtype="bfloat16")
    assert made.conversion is None and made.out == tmp_path / "out"
    assert redepth.inspect(made.out, num_steps=[3])["dtype"] == "bfloat16"
    with pytest.raises(RedepthError, match="recurrent already.*leave --core out"):
        redepth.convert(HUGINN, tmp_path / "other", core="0:1")
    with pytest.raises(RedepthError, match="recurrent already.*name the folder"):
        redepth.convert(HUGINN)


def test_a_source_keeps_its_architecture(tmp_path: Path) -> None:
    redepth.convert(GRIFFIN, tmp_path / "out", keep_architecture=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "recurrent_gemma"


def test_a_conversion_is_planned_made_and_verified(source: Path, tmp_path: Path) -> None:
    planned = redepth.convert(source, core="2:4")
    assert planned.out is None and planned.conversion is not None and planned.verification is None
    told: list[tuple[str, float]] = []
    shown: list[object] = []
    made = redepth.convert(
        source, tmp_path / "out", core="2:4", verify=True, device="cpu", on_plan=shown.append,
        on_progress=lambda part, done: told.append((part, done)),
    )  # fmt: skip
    assert made.verification is not None and made.verification.passed
    assert shown == [made.conversion]
    assert ("convert", 1.0) in told and ("verify", 1.0) in told


def test_a_plan_is_proposed(source: Path) -> None:
    search = redepth.plan(source, rows=4, sequence_length=16, core_layers=2, drop_layers=0, adapters=["inject"])
    assert search.tokens == 64 and not search.dropping


def test_healing_takes_a_file_a_table_and_changes(converted: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(converted, tmp_path / "out"))
    recipe = redepth.HealRecipe(**SHORT | {"max_steps": 2})
    assert api.plan_healing(checkpoint, recipe, max_steps=3).steps == 3
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"heal": SHORT}))
    assert redepth.heal(checkpoint, file, max_steps=1).steps == 1
    assert read_recipe(checkpoint)["heal"]["max_steps"] == 1
    with pytest.raises(RedepthError, match="max_steps"):
        redepth.heal(checkpoint, recipe, max_steps=-1)


def test_calibration_reads_its_text(converted: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(converted, tmp_path / "out"))
    profile = redepth.calibrate(checkpoint, rows=1, sequence_length=16, most_steps=2, device="cpu")
    assert redepth.load(checkpoint).config.depth_profile == profile


def test_a_fresh_model_is_counted_or_written(tmp_path: Path) -> None:
    counted = redepth.create(preset="nano", vocab_size=11)
    assert counted.out is None and counted.config.vocab_size == 11
    written = redepth.create(tmp_path / "out", vocab_size=11)
    assert sum(one.numel() for one in redepth.load(tmp_path / "out").parameters()) == written.parameters.total


def test_names_are_there_when_asked_for() -> None:
    assert all(getattr(redepth, name) is not None for name in redepth.__all__)
    assert set(redepth.__all__) <= set(dir(redepth))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        redepth.nonsense  # noqa: B018

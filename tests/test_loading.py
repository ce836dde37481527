"""One loader for every verb: what does not fit is refused by name, whoever asks; sources are found again, and run no code."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import redepth
from redepth.checkpoint.folder import read_recipe
from redepth.checkpoint.load import load_tokenizer
from redepth.checkpoint.republish import republish
from redepth.checkpoint.sources import open_source, recorded_source
from redepth.errors import RedepthError
from redepth.evaluation.calibrate import calibrate
from redepth.evaluation.held_out import evaluate_held_out
from redepth.healing.heal import heal
from redepth.healing.recipe import HealRecipe
from redepth.runtime import choose_device, has_bf16
from redepth.surgery.convert import plan_conversion
from tests.test_healing import SHORT, byte_tokenizer
from tests.zoo import make_model, random_ids

NAME = "transformer.adapter.weight"
VERBS: dict[str, Callable[[Path], object]] = {
    "load": redepth.load,
    "verify": redepth.verify,
    "heal": lambda folder: heal(folder, HealRecipe(**SHORT)),
    "calibrate": lambda folder: calibrate(folder, random_ids(1, 9), "letters", 2),
    "evaluate": lambda folder: evaluate_held_out(folder, random_ids(1, 9), "letters", (1,)),
}
DAMAGES: dict[str, tuple[Callable[[dict], object], str]] = {
    "missing": (lambda tensors: tensors.pop(NAME), f"lacks tensor '{NAME}'"),
    "unexpected": (lambda tensors: tensors.update(strange=torch.ones(2)), "has no place for tensor 'strange'"),
    "misshapen": (lambda tensors: tensors.update({NAME: torch.ones(3, 3)}), f"has the wrong shape of tensor '{NAME}'"),
    "nan": (lambda tensors: tensors[NAME][2, 3:5].fill_(torch.nan), f"has 2 values that are NaN .* '{NAME}'"),
    "infinite": (lambda tensors: tensors[NAME][0, 0].fill_(-torch.inf), f"has 1 values that are NaN .* '{NAME}'"),
}


@pytest.fixture(scope="module")
def converted(zoo, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("loading")
    shutil.copytree(zoo["llama"], folder / "source")
    byte_tokenizer().save_pretrained(folder / "source")
    redepth.convert(folder / "source", folder / "out", core="2:4")
    return folder / "out"


@pytest.fixture
def checkpoint(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "out"))


def change_weights(folder: Path, change: Callable[[dict], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_do_not_fit_are_refused_by_every_verb(checkpoint: Path, verb: str, damage: str) -> None:
    change, message = DAMAGES[damage]
    change_weights(checkpoint, change)
    before = sorted(checkpoint.rglob("*"))
    with pytest.raises(RedepthError, match=message):
        VERBS[verb](checkpoint)
    assert sorted(checkpoint.rglob("*")) == before


def test_large_weights_are_not_taken_for_infinite(checkpoint: Path) -> None:
    """Their sum overflows in fp16, and they do not."""
    change_weights(checkpoint, lambda tensors: tensors[NAME].fill_(60_000.0))
    assert redepth.load(checkpoint, "float16").dtype == torch.float16


def test_a_source_is_checked_too(converted: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(converted.parent / "source", tmp_path / "source"))
    change_weights(source, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(RedepthError, match=r"lacks tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        open_source(source).reference_model()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../secret.safetensors"}}, "outside the folder, in '../secret"),
        ({"weight_map": {"a": "/etc/secret.safetensors"}}, "outside the folder"),
        ({"weight_map": {"a": 3}}, "outside the folder"),
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "which is missing"),
        ({"weight_map": {}}, "no weight_map"),
        ([], "no weight_map"),
    ],
)
def test_an_index_does_not_lead_out_of_its_folder(checkpoint: Path, index: object, message: str) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "secret.safetensors")
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (redepth.load, lambda folder: open_source(folder).tensor_names()):
        with pytest.raises(RedepthError, match=message):
            read(checkpoint)


def test_what_is_written_into_is_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RedepthError, match="'org/tiny' is no local folder.*redepth convert org/tiny tiny"):
        VERBS["calibrate"](Path("org/tiny"))
    with pytest.raises(RedepthError, match="does not exist"):
        VERBS["calibrate"](tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_what_transformers_takes_is_passed_on(checkpoint: Path) -> None:
    ids = random_ids(1, 9)
    plain = redepth.load(checkpoint)
    spread = redepth.load(checkpoint, device_map={"": "cpu"}, attn_implementation="eager")
    assert spread.config._attn_implementation == "eager"
    with torch.no_grad():
        torch.testing.assert_close(spread(ids, num_steps=2).logits, plain(ids, num_steps=2).logits)
    with pytest.raises(RedepthError, match="no readable configuration"):
        redepth.load("nobody/nothing", revision="v1")


@pytest.mark.parametrize("device", ["banana", "meta", "mps", "cuda:99"])
def test_devices_that_are_not_there(checkpoint: Path, device: str) -> None:
    with pytest.raises(RedepthError, match=f"device '{device}'"):
        redepth.load(checkpoint, device=device)


def test_bf16_that_is_emulated_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: asked.append(including_emulation))
    monkeypatch.setattr("redepth.runtime.choose_device", lambda name: torch.device("cuda"))
    has_bf16()
    assert asked == [False]
    monkeypatch.undo()
    assert choose_device("cpu") == torch.device("cpu")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache with a repository of two commits, as huggingface_hub lays it out."""
    root = tmp_path / "cache" / "models--org--tiny"
    for commit, seed in (("a" * 40, 0), ("b" * 40, 1)):
        folder = root / "snapshots" / commit
        model = make_model("qwen3")
        torch.manual_seed(seed)
        with torch.no_grad():
            model.lm_head.weight.normal_()
        model.save_pretrained(folder)
        (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("b" * 40)
    (root / "refs" / "v1").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return root


def test_a_revision_is_read_and_its_commit_recorded(hub: Path, tmp_path: Path) -> None:
    redepth.convert("org/tiny", tmp_path / "new", core="2:4")
    redepth.convert("org/tiny", tmp_path / "old", core="2:4", revision="v1")
    recipe = read_recipe(tmp_path / "old")
    assert recipe["convert"]["revision"] == recipe["source"]["commit"] == "a" * 40
    assert read_recipe(tmp_path / "new")["convert"]["revision"] == "b" * 40
    assert f"`org/tiny` (commit `{'a' * 40}`)" in (tmp_path / "old" / "README.md").read_text()
    assert redepth.verify(tmp_path / "old").passed
    assert not redepth.verify(tmp_path / "old", "org/tiny").passed
    assert redepth.verify(tmp_path / "old", "org/tiny", revision="v1").passed
    with pytest.raises(RedepthError, match="'org/tiny'.*at revision 'v2'"):
        redepth.convert("org/tiny", tmp_path / "out", revision="v2")
    with pytest.raises(RedepthError, match="is local; leave it out"):
        redepth.convert(tmp_path / "old", tmp_path / "out", revision="v1")


def test_a_relative_source_is_found_from_elsewhere(zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(zoo["qwen3"], tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    redepth.convert("models/tiny", "out", core="2:4")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert redepth.verify("../out").passed
    shutil.move(tmp_path / "models", tmp_path / "moved")
    with pytest.raises(RedepthError, match="which can't be found from here; name the source"):
        redepth.verify(tmp_path / "out")
    # As an earlier version recorded it: never to be taken for a hub id.
    recipe = read_recipe(tmp_path / "out")
    recipe["convert"]["source"] = "models/tiny"
    (tmp_path / "out" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(RedepthError, match="'models/tiny', which can't be found from here"):
        recorded_source(tmp_path / "out")


def test_no_code_of_a_source_runs_and_nobody_is_asked(zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(zoo["llama"], tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise RuntimeError('ran')\n")
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked"))
    with pytest.raises(RedepthError, match="can't read its configuration"):
        redepth.convert(source, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    with pytest.raises(RuntimeError, match="ran"):
        redepth.convert(source, tmp_path / "out", trust_remote_code=True)


@pytest.mark.parametrize(
    "card",
    [
        "---\na: [\n---\n",
        "---\n\ttags: 5\n---\n",
        "---\nlicense: [a, b]\n---\n",
        "---\ntags: 5\nmodel-index: 3\n---\n",
        "\ufffe",
    ],
)
def test_a_broken_card_blocks_no_conversion(zoo, tmp_path: Path, card: str) -> None:
    source = Path(shutil.copytree(zoo["qwen3"], tmp_path / "source"))
    (source / "README.md").write_bytes(card.encode("utf-16" if card == "\ufffe" else "utf-8"))
    assert open_source(source).license is None


def test_a_tokenizer_of_few_tokens_is_no_text_to_verify_on(converted: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(converted.parent / "source", tmp_path / "source"))
    redepth.convert(source, tmp_path / "out", core="2:4")
    load_tokenizer(source).train_new_from_iterator(["a"], 260).save_pretrained(source)  # ids beyond the vocabulary
    verification = redepth.verify(tmp_path / "out", source)
    assert verification.passed
    assert "random tokens" in verification.text


FAMILY = """
extends: llama
name: mine
covers: one's own
model_type: {model_type}
"""


def test_a_family_of_ones_own(zoo, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(FAMILY.format(model_type="llama"))
    redepth.convert(zoo["llama"], tmp_path / "out", core="2:4", family=file)
    assert read_recipe(tmp_path / "out")["convert"]["family"] == str(file)
    file.unlink()
    assert redepth.verify(tmp_path / "out").passed
    for content, message in (
        (None, "can't be read"),
        ("[]", "not a table"),
        ("a: [", "can't be read"),
        ("extends: lama", "extends 'lama'; use one of gemma"),
        (FAMILY.format(model_type="qwen3"), "is for 'qwen3', but the source is 'llama'"),
        (FAMILY.format(model_type="llama") + "wings: 2", "my.yaml: wings: Extra inputs"),
        (FAMILY.format(model_type="llama") + "requires: 3", "requires is 3"),
        (FAMILY.format(model_type="llama") + "requires: [3]", r"requires is \[3\]"),
        (FAMILY.format(model_type="llama") + "3: 4", "a key is no word"),
        (FAMILY.format(model_type="llama") + "layer: {attn.proj.weight: 3}", "my.yaml: layer.attn.proj.weight"),
        ("model_type: llama", "my.yaml: name: Field required"),
    ):
        if content is not None:
            file.write_text(content)
        with pytest.raises(RedepthError, match=message) as told:
            plan_conversion(zoo["llama"], family=file)
        assert "\n" not in str(told.value)


def test_republishing_keeps_what_is_still_true(converted: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(converted, tmp_path / "in"))
    redepth.verify(checkpoint)
    record = {"data": "letters", "rows": 1, "tokens": 9, "loss": {"1": 2.0}, "source_loss": None}
    (checkpoint / "evaluation.json").write_text(json.dumps(record))
    (checkpoint / "healing-log.jsonl").write_text("")
    republish(checkpoint, tmp_path / "same")
    kept = {"verification.json", "evaluation.json", "recipe.yaml", "healing-log.jsonl", "README.md"}
    assert kept <= {file.name for file in (tmp_path / "same").iterdir()}
    republish(checkpoint, tmp_path / "rounded", dtype="bfloat16")
    # Other weights than those that were measured.
    assert not (tmp_path / "rounded" / "verification.json").exists()
    assert not (tmp_path / "rounded" / "evaluation.json").exists()
    assert read_recipe(tmp_path / "rounded")["convert"]["dtype"] == "bfloat16"
    assert "Not verified yet" in (tmp_path / "rounded" / "README.md").read_text()
    assert redepth.verify(tmp_path / "rounded").passed

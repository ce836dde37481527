"""What `redepth inspect` says, and that it says it without loading what models need."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import redepth
from redepth.checkpoint.cost import count_parameters
from redepth.checkpoint.load import read_config
from redepth.checkpoint.recorded import read_plainly, tensor_headers, weights_of
from redepth.errors import RedepthError
from redepth.modeling.config_checks import ROPE_TYPES
from redepth.modeling.fields import RecurrentDepthFields
from tests.zoo import FAMILIES

HUGINN = Path(__file__).parent / "golden" / "huginn-tiny"


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inspect") / request.param
    return redepth.convert(zoo[request.param], out, core="2:4", verify=request.param == "llama").out


def counted(config) -> dict[str, int]:
    """Parameters by part, from the modules of a model without weights."""
    with torch.device("meta"):
        model = redepth.RecurrentDepthForCausalLM(config)
    sizes = dict.fromkeys(("embedding", "prelude", "core", "coda", "head"), 0)
    parts = {"wte": "embedding", "adapter": "core", "core_block": "core", "state_gate": "core", "ln_f": "coda"}
    for name, parameter in model.named_parameters():  # a tied head counts once, as embedding
        part = name.removeprefix("transformer.").partition(".")[0]
        sizes["head" if part == "lm_head" else parts.get(part, part)] += parameter.numel()
    return sizes | {"total": sum(sizes.values())}


def test_the_formula_counts_what_the_modules_have(checkpoint: Path) -> None:
    config, _ = read_config(checkpoint)
    assert count_parameters(config).by_part() == counted(config)
    config.state_gate, config.proj_bias, config.mlp_bias = True, True, True
    assert count_parameters(config).by_part() == counted(config)


def test_huginn_is_counted_too() -> None:
    config, _ = read_config(HUGINN)
    assert count_parameters(config).by_part() == counted(config)


def same_fields(folder: Path) -> None:
    plain, whole = read_plainly(folder), read_config(folder)
    assert plain is not None
    assert plain[1] == whole[1]
    for field in fields(RecurrentDepthFields):
        assert getattr(plain[0], field.name) == getattr(whole[0], field.name), field.name
    assert f"torch.{plain[0].dtype}" == str(whole[0].dtype or torch.float32)


def test_a_plain_reading_says_what_transformers_reads(checkpoint: Path) -> None:
    same_fields(checkpoint)


def test_a_published_checkpoint_is_read_plainly(tmp_path: Path) -> None:
    same_fields(HUGINN)
    # An inferred kind comes with remarks, which transformers' logger makes.
    config = json.loads((HUGINN / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}))
    assert read_plainly(tmp_path) is None


def test_what_is_unusual_is_left_to_transformers(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    for change in (
        {"hidden_size": 48},
        {"rope_parameters": {"rope_type": "new", "rope_theta": 1.0}},
        {"dtype": "float8_e4m3fn"},
        {"n_embd": "wide"},
        {"model_type": "llama"},
        {"test_time_noise": 0.1},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        assert read_plainly(tmp_path) is None, change
    (tmp_path / "config.json").write_text("[]")
    assert read_plainly(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": config["n_embd"]}))
    assert read_plainly(tmp_path) is not None


def test_known_rotary_positions_are_those_of_transformers() -> None:
    assert set(ROPE_TYPES) <= {"default", *ROPE_INIT_FUNCTIONS}


def test_headers_are_read_without_weights(checkpoint: Path, tmp_path: Path) -> None:
    model = redepth.load(checkpoint)
    said = weights_of(checkpoint)
    assert said is not None
    assert said["numbers"] == sum(parameter.numel() for parameter in model.parameters())
    assert said["bytes"] == sum(parameter.nbytes for parameter in model.parameters())
    headers = tensor_headers(checkpoint)
    assert headers["transformer.adapter.weight"]["shape"] == [24, 48]
    assert weights_of(tmp_path) is None
    for cut in (4, 40, 2_000):
        (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-cut])
        with pytest.raises(RedepthError, match="perhaps cut short"):
            weights_of(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"hello, weights")
    with pytest.raises(RedepthError, match="perhaps cut short"):
        weights_of(tmp_path)


def test_sharded_weights_are_found(zoo, tmp_path: Path) -> None:
    out = redepth.convert(zoo["llama"], tmp_path / "out", core="2:4", max_shard_size="0.02MB", verify=False).out
    said = weights_of(out)
    assert said is not None
    assert said["files"] == len(list(out.glob("*.safetensors"))) > 1
    (out / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(RedepthError, match="no weight_map"):
        weights_of(out)


NEITHER = (
    "import sys, redepth; print(redepth.inspect(sys.argv[1])['kind'], {'torch', 'transformers'} & set(sys.modules))"
)


@pytest.mark.parametrize("family", ["llama", "gemma3", "griffin", "huginn"])
def test_no_modelling_code_is_imported(family: str, zoo, tmp_path: Path) -> None:
    folder = HUGINN
    if family != "huginn":
        folder = redepth.convert(zoo[family], tmp_path / "out", core="2:4", verify=False).out
    done = subprocess.run([sys.executable, "-c", NEITHER, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("set()")
    assert "published, huginn" in done.stdout or "converted by redepth" in done.stdout


def test_a_missing_checkpoint_is_said_at_once() -> None:
    script = (
        "import sys, redepth\n"
        "try: redepth.inspect('./nowhere')\n"
        "except redepth.RedepthError as error: print(error, {'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "does not exist" in done.stdout
    assert done.stdout.strip().endswith("set()")


def test_it_says_whether_it_was_verified(zoo, tmp_path: Path) -> None:
    out = redepth.convert(zoo["qwen3"], tmp_path / "out", core="2:4", verify=False).out
    assert redepth.inspect(out)["verified"] is None
    redepth.verify(out)
    assert redepth.inspect(out)["verified"] is True
    (out / "verification.json").write_text("[]")
    with pytest.raises(RedepthError, match="restore or remove"):
        redepth.inspect(out)

"""DeepMind's own layout: a file that its package wrote, and the logits that its package makes of it."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import redepth
from redepth.checkpoint.deepmind import DeepMindSource
from redepth.checkpoint.rewrite import rewrite
from redepth.checkpoint.sources import open_source
from redepth.errors import RedepthError
from redepth.surgery.convert import plan_conversion
from tests.tolerance import tolerance

FOLDER = Path(__file__).parent / "golden" / "griffin-tiny"
FILE = FOLDER / "griffin-tiny.pt"
CLOSE = tolerance(layers=2 + 2 * 3)


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "golden.safetensors")


@pytest.fixture
def source() -> DeepMindSource:
    """The golden model looks 5 tokens back; the file does not say so, and the published ones look 2,048 back."""
    source = open_source(FILE)
    assert source.config.attention_window_size == 2049
    source.config.attention_window_size = 6
    return source


def test_logits_are_those_of_deepminds_code(source, golden, tmp_path: Path) -> None:
    ids = golden["input_ids"]
    rewrite(source, tmp_path / "plain")
    with torch.no_grad():
        torch.testing.assert_close(source.reference_model()(ids, use_cache=False).logits, golden["logits"], **CLOSE)
        for model in (redepth.load(tmp_path / "plain"), AutoModelForCausalLM.from_pretrained(tmp_path / "plain")):
            torch.testing.assert_close(model.eval()(ids, use_cache=False).logits, golden["logits"], **CLOSE)
        deep = plan_conversion(source, core="1:3", adapter="inject").model()
        for num_steps in (1, 3):
            torch.testing.assert_close(deep(ids, num_steps=num_steps).logits, golden["logits"], **CLOSE)


def test_sizes_are_read_from_the_tensors(source) -> None:
    config = source.config
    assert (config.hidden_size, config.lru_width, config.intermediate_size, config.vocab_size) == (16, 24, 48, 61)
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (2, 1, 4)
    assert config.block_types == ["recurrent", "recurrent", "attention"]
    assert source.dtype == torch.float32
    assert source.tokenizer is None


def test_convert_and_verify(tmp_path: Path) -> None:
    redepth.convert(FILE, tmp_path / "deep")
    assert redepth.verify(tmp_path / "deep").passed
    card = (tmp_path / "deep" / "README.md").read_text()
    assert "license: gemma" in card


def save(tensors: object, file: Path) -> Path:
    torch.save(tensors, file)
    return file


def without(name: str) -> dict[str, torch.Tensor]:
    tensors = torch.load(FILE, weights_only=True)
    del tensors[name]
    return tensors


@pytest.mark.parametrize("how", ["surgery", "rewrite"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: {"weight": torch.zeros(3)}, "holds no tensor 'embedder.input_embedding'"),
        (lambda: [torch.zeros(3)], "holds no tensor"),
        (
            lambda: without("blocks.1.recurrent_block.linear_x.bias"),
            "lacks tensor 'model.layers.1.temporal_block.linear_x",
        ),
        (
            lambda: without("blocks.0.recurrent_block.rg_lru.a_param"),
            "lacks tensor 'blocks.0.recurrent_block.rg_lru.a_p",
        ),
        (lambda: without("blocks.3.recurrent_block.linear_y.weight") | {"odd": torch.zeros(1)}, "tensor '"),
        (lambda: torch.load(FILE) | {"blocks.0.gate": torch.zeros(1)}, "holds tensor 'model.layers.0.gate'"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, how: str, make, message: str) -> None:
    file = save(make(), tmp_path / "wrong.pt")
    with pytest.raises(RedepthError, match=message) as caught:
        (redepth.convert if how == "surgery" else rewrite)(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_tensors(tmp_path: Path) -> None:
    (tmp_path / "cut.pt").write_bytes(FILE.read_bytes()[:-900])
    save({"run": shutil.rmtree}, tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("cut.pt", "code.pt", "text.pt"):
        with pytest.raises(RedepthError, match=r"not a readable \.pt file of tensors") as caught:
            redepth.convert(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(caught.value)
    with pytest.raises(RedepthError, match="does not exist"):
        redepth.convert("nowhere.pt", tmp_path / "out")
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    shutil.copy(FILE, tmp_path / "whole.pt")
    with pytest.raises(RedepthError, match=r"tokenizer\.model can't be read"):
        redepth.convert(tmp_path / "whole.pt", tmp_path / "out")


@pytest.mark.parametrize("name", ["llama", "griffin"])
def test_any_source_can_keep_its_architecture(zoo, tmp_path: Path, name: str) -> None:
    rewrite(zoo[name], tmp_path / "out", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(zoo[name], dtype=torch.bfloat16)
    for key, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor)

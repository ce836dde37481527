"""Contract 4: saved folders load alike here and in a transformers that has never heard of redepth."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import redepth
from redepth.checkpoint.republish import republish
from redepth.errors import RedepthError
from tests.test_golden import FOLDER as HUGINN
from tests.zoo import FAMILIES, random_ids

# Recurrent layers go with the first two.
POLICIES: list[dict] = [{}, {"criterion": "kl"}, {"draft_steps": 1}, {"sampler": "wavefront"}]
# What chooses the processor's instructions and threads: the other process must add as this one does.
ARITHMETIC = {
    name: value for name, value in os.environ.items() if name.startswith(("ATEN_", "OMP_", "MKL_", "ONEDNN_"))
}
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "redepth":
            raise ImportError("redepth is not to be had here")
sys.meta_path.insert(0, Block())
"""
PLAIN = (
    BLOCK
    + """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
import logging
said = []
class Keep(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger().addHandler(Keep())
out = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "huginn_raven"
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        # An argument that transformers may add one day must not break what was saved before.
        out[folder] = model(ids, num_steps=3, of_a_later_day=True).logits
    options = {"num_steps": 3, "max_new_tokens": 5, "do_sample": False}
    for policy in POLICIES[: 2 if model.config.has_lru else None]:
        out[folder + "/" + "".join(policy)] = model.generate(ids, **options, **policy)
assert "redepth" not in sys.modules
assert sum("unknown argument 'of_a_later_day'" in one for one in said) == len(sys.argv[2:]), said
torch.save(out, sys.argv[1])
""".replace("POLICIES", repr(POLICIES))
)


@pytest.fixture(scope="module")
def converted(zoo, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("converted")
    for name, source in zoo.items():
        redepth.convert(source, root / name, core="2:4", adapter="random", state="noise")
    redepth.convert(zoo["gemma2"], root / "gated", core="2:4", adapter="gate:0.5", state="noise")
    republish(HUGINN, root / "huginn")
    return {name: root / name for name in [*zoo, "gated", "huginn"]}


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "generation_config.json"}


def test_save_load_save_gives_the_same_bytes(family: str, converted, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(converted[family]).save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second, original = files_of(tmp_path / "first"), files_of(tmp_path / "second"), files_of(converted[family])
    assert first == second
    assert first["config.json"] == original["config.json"]
    assert (
        load_file(tmp_path / "first" / "model.safetensors").keys()
        == load_file(converted[family] / "model.safetensors").keys()
    )


def test_a_gate_is_saved_and_loaded(converted, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(converted["gated"]).save_pretrained(tmp_path / "first")
    first, original = (load_file(folder / "model.safetensors") for folder in (tmp_path / "first", converted["gated"]))
    assert first.keys() == original.keys() and "transformer.state_gate.weight" in first
    assert all(torch.equal(first[name], original[name]) for name in first)


def test_modelling_files_are_redepths_own(converted) -> None:
    package = Path(redepth.__file__).parent / "modeling"
    exported = {file.name: file.read_text() for file in converted["llama"].glob("*.py")}
    assert {"model.py", "configuration.py"} < exported.keys()
    assert exported == {name: (package / name).read_text() for name in exported}


def test_folders_load_without_redepth(converted, tmp_path: Path) -> None:
    folders = {name: str(folder) for name, folder in converted.items()}
    subprocess.run(
        [sys.executable, "-c", PLAIN, str(tmp_path / "out.pt"), *folders.values()],
        check=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "HOME": str(tmp_path)} | ARITHMETIC,
        capture_output=True,
        text=True,
    )
    plain = torch.load(tmp_path / "out.pt")
    ids = torch.arange(3, 20)[None]
    assert len(folders) == len(FAMILIES) + 2
    for folder in folders.values():
        model = redepth.load(folder)
        with torch.no_grad():
            assert torch.equal(model(ids, num_steps=3).logits, plain[folder])
        for policy in POLICIES[: 2 if model.config.has_lru else None]:
            got = model.generate(ids, num_steps=3, max_new_tokens=5, do_sample=False, **policy)
            assert torch.equal(got, plain[folder + "/" + "".join(policy)])


def test_load_in_other_dtypes(converted) -> None:
    model = redepth.load(converted["olmo2"], dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        logits = model(random_ids(1, 5), num_steps=2).logits
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    with pytest.raises(RedepthError, match="float8"):
        redepth.load(converted["olmo2"], dtype="float8")


def test_what_cannot_be_loaded_is_said(converted, zoo, tmp_path: Path) -> None:
    with pytest.raises(RedepthError, match="does not exist"):
        redepth.load(tmp_path / "nowhere")
    with pytest.raises(RedepthError, match=r"no config\.json"):
        redepth.load(tmp_path)
    with pytest.raises(RedepthError, match="'llama'.*redepth convert"):
        redepth.load(zoo["llama"])
    redepth.convert(zoo["llama"], tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-500])
    with pytest.raises(RedepthError, match="cut short"):
        redepth.load(tmp_path / "cut")
    tensors = load_file(converted["llama"] / "model.safetensors")
    from safetensors.torch import save_file

    del tensors["transformer.adapter.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RedepthError, match=r"lacks tensor 'transformer\.adapter\.weight'"):
        redepth.load(tmp_path / "cut")

"""The card's own snippet, run as a stranger would: in plain transformers, for every family; and a plain Trainer resumes."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import redepth
from tests.test_checkpoints import BLOCK
from tests.test_healing import byte_tokenizer
from tests.zoo import FAMILIES

RUN = (
    BLOCK
    + """
import os, traceback
for name in sys.argv[1:]:
    os.chdir(name)
    said = open("snippet.py").read()
    try:
        exec(said, {})
    except Exception:
        traceback.print_exc()
        sys.exit(f"the snippet of {name} fails")
assert "redepth" not in sys.modules
"""
)
TRAIN = (
    BLOCK
    + """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
folder, resume = sys.argv[1], len(sys.argv) > 2
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
rows = [{"input_ids": [3 + i, 4, 5, 6], "labels": [3 + i, 4, 5, 6]} for i in range(4)]
arguments = TrainingArguments(
    folder + "/../trained", max_steps=4 if resume else 2, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
    per_device_train_batch_size=2,
)
trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
trainer.train(resume_from_checkpoint=resume)
assert trainer.state.global_step == (4 if resume else 2)
"""
)


def run(script: str, *words: object, folder: Path) -> None:
    environment = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_snippet_of_every_family_runs_without_redepth(zoo, tmp_path: Path) -> None:
    for name, source in zoo.items():
        shutil.copytree(source, tmp_path / "sources" / name)
        byte_tokenizer().save_pretrained(tmp_path / "sources" / name)
        redepth.convert(tmp_path / "sources" / name, tmp_path / name / "out", core="2:4")
        card = (tmp_path / name / "out" / "README.md").read_text()
        found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
        assert found is not None
        (tmp_path / name / "snippet.py").write_text(found[1])
    run(RUN, *(tmp_path / name for name in FAMILIES), folder=tmp_path)


def test_a_plain_trainer_resumes(zoo, tmp_path: Path) -> None:
    """With Llama 3's rope, whose configuration needs to know the longest text wherever it is read."""
    shutil.copytree(zoo["llama"], tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    redepth.convert(tmp_path / "source", tmp_path / "out", core="2:4")
    run(TRAIN, tmp_path / "out", folder=tmp_path)
    run(TRAIN, tmp_path / "out", "resume", folder=tmp_path)

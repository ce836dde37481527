"""redepth analyze on problems: what is judged, beside a static control, in compact ids and in words."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

import redepth
from redepth import RedepthError
from redepth.analysis.analyze import analyze
from redepth.cli import app
from redepth.data.tasks import open_task
from redepth.healing.from_scratch import TaskTraining
from tests.test_healing import byte_tokenizer
from tests.test_task_comparison import SPEC, trained

R = 7


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("small")
    trained(root / "looped", SPEC, TaskTraining(updates=60, batch_size=16))
    trained(root / "static", SPEC, TaskTraining("last", num_steps=1, updates=5, batch_size=16))
    return root


@pytest.fixture(scope="module")
def analysis(small: Path) -> tuple[Path, dict[str, Any]]:
    out = small / "seen"
    return out, analyze(small / "looped", out=out, num_steps=R, rows=3, compare=f"{small / 'static'}:1")


def test_answers_are_what_is_judged(small: Path, analysis: tuple[Path, dict[str, Any]]) -> None:
    out, summary = analysis
    batch = open_task(SPEC).batch("held-out", 3)
    for name, steps in (("looped", R), ("looped", 1), ("static", 1)):
        with torch.no_grad():
            logits = batch.at_answers(redepth.load(small / name)(batch.ids, num_steps=steps).logits)
        figures = summary["figures"] if name == "looped" else summary["compare"]["figures"]
        assert figures["right"][steps - 1] == pytest.approx(
            (logits.argmax(-1) == batch.labels).float().mean().item(), abs=1e-4
        )
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()).item()
        assert figures["loss"][steps - 1] == pytest.approx(loss, abs=1e-4)
    assert summary["figures"]["answers"] == batch.labels.numel()
    assert re.search(r"Of 21 answers \d+% are right at r = 1", summary["verdict"])
    assert re.search(r"Run at r = 1 alone; of 21 answers \d+% are right", summary["compare"]["verdict"])
    table = pq.read_table(out / "tokens.parquet").to_pandas()
    asked = table[table.difficulty.notna()]
    assert asked.target.tolist() == batch.labels.flatten().tolist()
    assert asked.difficulty.tolist() == batch.difficulty.flatten().tolist()
    assert summary["made_by"]["texts"] == SPEC


def test_the_report_shows_the_answers(analysis: tuple[Path, dict[str, Any]]) -> None:
    out, _ = analysis
    text = (out / "report.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])
    words = open_task(SPEC).words
    batch = open_task(SPEC).batch("held-out", 3)
    for row, tokens in enumerate(data):
        assert [token["token"] for token in tokens] == [f"{words[one]} " for one in batch.ids[row].tolist()]
        assert [one["target"] for one in tokens if one["target"]] == [words[one] for one in batch.labels[row].tolist()]
    assert "3 held-out problems of <code>task:roots?depth=0-2&amp;nodes=7</code> with 21 answers" in text
    assert "right answers, share" in text


def test_words(zoo: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(zoo["qwen3"], tmp_path / "source"))
    byte_tokenizer().save_pretrained(source)
    redepth.convert(source, tmp_path / "recurrent", core="2:4", adapter="blend:0.5", state="embed", dtype="float32")
    spec = "task:roots?depth=0-1&nodes=5"
    summary = analyze(tmp_path / "recurrent", data=spec, out=tmp_path / "out", num_steps=R, rows=2, compare=source)
    table = pq.read_table(tmp_path / "out" / "tokens.parquet").to_pandas()
    problems = sorted(open_task(spec).texts("held-out", 2, 0, 4), key=lambda problem: len(problem.text))
    for row, problem in enumerate(problems):
        own = table[table.text == row]
        assert "".join(own.token).replace("?!", "\n") == problem.text
        said = [byte_tokenizer().decode([int(one)]) for one in own.target.dropna()]
        assert "".join(said) == "".join(answer.right for answer in problem.answers)
    # At one step the conversion is its source.
    assert summary["figures"]["right"][0] == summary["compare"]["figures"]["right"][0]


def test_a_checkpoint_without_a_task_needs_a_text(zoo: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(zoo["qwen3"], tmp_path / "source"))
    byte_tokenizer().save_pretrained(source)
    redepth.convert(source, tmp_path / "recurrent", core="2:4")
    with pytest.raises(RedepthError, match="either prompts or data"):
        analyze(tmp_path / "recurrent", out=tmp_path / "out")
    with pytest.raises(RedepthError, match="did you mean 'roots'"):
        analyze(tmp_path / "recurrent", data="task:rots", out=tmp_path / "out")


def test_the_command(small: Path, tmp_path: Path) -> None:
    words = ["analyze", str(small / "looped"), "--compare", f"{small / 'static'}:1", "--num-steps", "7", "--rows", "1"]
    run = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert run.exit_code == 0, run.output
    assert "answers" in run.output and "Run at r = 1 alone" in run.output

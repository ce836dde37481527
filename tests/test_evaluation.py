"""lm-eval's tasks at every depth: against plain lm-eval, one request at a time, and after a kill."""

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import redepth
from redepth.cli import app
from redepth.evaluation.scores import paired
from tests.evaluated import make_models, write_rows
from tests.test_healing import byte_tokenizer

pytest.importorskip("lm_eval")
DEPTHS = (1, 2, 5)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def models(zoo, tmp_path_factory) -> Path:
    return make_models(zoo, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def found(models, rows, tmp_path_factory):
    """The evaluation that most tests look at."""
    return redepth.evaluate(
        models / "recurrent",
        ["arc_easy", "sciq", "lambada_openai"],
        num_steps=DEPTHS,
        data_dir=rows,
        batch_size=4,
        criterion="latent-diff",
        exit_threshold=0.3,
        compare=[str(models / "source"), f"{models / 'recurrent'}:3"],
        out=tmp_path_factory.mktemp("found") / "out",
    )


def plain_results(folder: Path, rows: Path, names: list[str], num_steps: int | None) -> dict:
    """By lm-eval's own class from what transformers loads, one run for a depth."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from redepth.evaluation.asking import flat, set_examples
    from redepth.evaluation.stock_tasks import load_tasks

    depth = {"num_steps": num_steps} if num_steps is not None else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **depth)
    lm = HFLM(model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4)
    tasks = flat(load_tasks(names, rows))
    for task in tasks["tasks"].values():
        set_examples(task, None)
    return evaluate(lm, tasks, bootstrap_iters=0)


@pytest.mark.parametrize(("depth", "num_steps"), [("r=1", 1), ("r=5", 5), ("no loop", None)])
def test_every_depth_equals_plain_lm_eval(found, models, rows, depth: str, num_steps: int | None) -> None:
    names = ["arc_easy", "sciq", "lambada_openai"]
    folder = models / ("source" if num_steps is None else "recurrent")
    plain = plain_results(folder, rows, names, num_steps)
    own = {
        (score.task, score.metric): score.value
        for score in found.scores
        if score.depth == depth and score.model == str(folder)
    }
    for task in names:
        for name, value in plain["results"][task].items():
            metric, _, kind = name.partition(",")
            if kind and not metric.endswith("_stderr"):
                assert own[task, metric] == pytest.approx(value, rel=1e-5), (task, metric)
    assert len(own) == 6


def test_costs_are_those_of_the_tokens_run(found, models, rows) -> None:
    tokenizer, model = byte_tokenizer(), redepth.load(models / "recurrent")
    content = [json.loads(line) for line in (rows / "arc_easy.jsonl").read_text().splitlines()]
    asked = [
        tokenizer(f"Question: {row['question']}\nAnswer: {choice}", return_tensors="pt")["input_ids"][:, :-1]
        for row in content
        for choice in row["choices"]["text"]
    ]
    tokens = sum(ids.shape[1] for ids in asked)
    steps = sum(
        model(ids, num_steps=5, criterion="latent-diff", exit_threshold=0.3).stats["num_steps"].sum().item()
        for ids in asked
    )
    by_depth = {
        score.depth: score
        for score in found.scores
        if (score.task, score.metric, score.model) == ("arc_easy", "acc", str(models / "recurrent"))
    }
    assert list(by_depth) == ["r=1", "r=2", "r=3", "r=5", "latent-diff"]
    assert by_depth["r=5"].tokens_per_answer == tokens / len(content)
    assert by_depth["r=5"].mean_steps == 5
    assert by_depth["latent-diff"].mean_steps == pytest.approx(steps / tokens, rel=0.02)
    assert 1 < steps / tokens < 5
    parts = {name: sum(p.numel() for p in model.transformer[name].parameters()) for name in ("prelude", "coda")}
    core = sum(p.numel() for name in ("core_block", "adapter") for p in model.transformer[name].parameters())
    outside = sum(parts.values()) + sum(p.numel() for p in model.transformer["ln_f"].parameters())
    assert by_depth["r=2"].flops_per_token == 2 * (outside + 2 * core)
    assert by_depth["r=2"].flops_per_answer == by_depth["r=2"].flops_per_token * tokens / len(content)
    assert by_depth["r=2"].effective_parameters == sum(p.numel() for p in model.parameters()) + core
    source = next(score for score in found.scores if score.depth == "no loop")
    assert source.mean_steps == 0 and source.flops_per_token < by_depth["r=1"].flops_per_token


def test_differences_are_paired(found, models) -> None:
    table = redepth_documents(found.out)
    name = str(models / "recurrent")
    one, other = (table[name, depth, "sciq", "acc"] for depth in ("r=5", "r=1"))
    shown = next(
        each
        for each in found.differences
        if (each.task, each.metric, each.depth, each.depth_from, each.model, each.model_from)
        == ("sciq", "acc", "r=5", "r=1", name, name)
    )
    apart = torch.tensor([one[number] - other[number] for number in range(5)], dtype=torch.float64)
    assert shown.difference == pytest.approx(apart.mean().item())
    assert shown.standard_error == pytest.approx(apart.std().item() / math.sqrt(5))
    assert paired({0: 1.0, 1: 0.0, 9: 5.0}, {0: 0.0, 1: 0.0}) == (0.5, pytest.approx(0.5), 2)
    assert not any(each.metric == "perplexity" for each in found.differences)  # no mean over documents


def redepth_documents(out: Path) -> dict:
    import pyarrow.parquet as pq

    found: dict = {}
    for row in pq.read_table(out / "documents.parquet").to_pylist():
        key = (row["model"], row["depth"], row["task"], row["metric"])
        found.setdefault(key, {})[row["document"]] = row["value"]
    return found


def test_what_is_written(found, models) -> None:
    assert {file.name for file in found.out.iterdir()} == {
        "results.json", "table.md", "accuracy.png", "accuracy.svg", "answers.sqlite", "documents.parquet", "lm-eval"
    }  # fmt: skip
    manifest = json.loads((found.out / "results.json").read_text())["manifest"]
    assert manifest["versions"]["redepth"] == redepth.__version__ and manifest["tasks"]["sciq"] == 1.0
    assert len(manifest["models"][str(models / "recurrent")]["recipe_sha256"]) == 64
    assert manifest["seeds"]["fewshot"] == 1234 and manifest["state_seed"] is not None
    own = json.loads((found.out / "lm-eval" / "recurrent" / "r-2.json").read_text())
    assert own["results"]["arc_easy"]["acc,none"] in {i / 5 for i in range(6)}
    assert own["config"]["manifest"]["prompts"][0]["tasks"] == ["arc_easy", "sciq", "lambada_openai"]
    assert "latent-diff" in (found.out / "table.md").read_text()
    assert (found.out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


class Killed(BaseException):
    pass


def test_a_killed_run_asks_nothing_twice(found, models, rows, tmp_path, monkeypatch) -> None:
    from redepth.evaluation.harness import SharedPass

    calls: list[int] = []
    logits = SharedPass.logits

    def counted(self: SharedPass, num_steps: int) -> torch.Tensor:
        if len(calls) == stop_at:
            raise Killed
        calls.append(num_steps)
        return logits(self, num_steps)

    monkeypatch.setattr(SharedPass, "logits", counted)
    arguments = {"num_steps": DEPTHS, "data_dir": rows, "batch_size": 4, "out": tmp_path / "out"}
    names = ["arc_easy", "sciq", "lambada_openai"]
    stop_at = 7  # in the third batch
    with pytest.raises(Killed):
        redepth.evaluate(models / "recurrent", names, **arguments)
    finished = len(calls) // 3 * 3
    calls.clear()
    stop_at = 10**9
    resumed = redepth.evaluate(models / "recurrent", names, **arguments)
    asked = len(calls)
    calls.clear()
    redepth.evaluate(models / "recurrent", names, **arguments)
    assert calls == []
    whole = redepth.evaluate(models / "recurrent", names, **arguments | {"out": tmp_path / "whole"})
    assert len(calls) == asked + finished and finished == 6
    assert [score.value for score in resumed.scores] == [score.value for score in whole.scores]
    assert [score.tokens_per_answer for score in resumed.scores] == [score.tokens_per_answer for score in whole.scores]


def test_the_command(models, rows, tmp_path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "over and over and over and over"}\n' * 8)
    spec = f"text:{text}?rows=2&length=32"
    words = ["eval", str(models / "recurrent"), "--tasks", f"arc_easy,{spec}", "--data-dir", str(rows), "--limit", "2"]
    words += ["--num-steps", "1,2", "--compare", str(models / "source"), "--out", str(tmp_path / "out")]
    run = CliRunner().invoke(app, [*words, "--json"])
    assert run.exit_code == 0, run.output
    said = json.loads(run.stdout)
    model, tokenizer = redepth.load(models / "recurrent"), byte_tokenizer()
    row = torch.tensor([tokenizer("over and over and over and over")["input_ids"] + [2]])
    expected = {f"r={r}": model(row, labels=row, num_steps=r).loss.item() for r in (1, 2)}
    whole = {one["depth"]: one["loss"] for one in said["texts"] if one["source"] == "text.jsonl"}
    assert set(whole) == {"r=1", "r=2", "no loop"}
    if row.shape[1] == 32:
        for depth, loss in expected.items():
            assert whole[depth] == pytest.approx(loss, rel=1e-4)
    shown = CliRunner().invoke(app, words)
    assert "arc_easy, 2 documents" in shown.output and "nats/token" in shown.output

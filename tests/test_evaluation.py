"""lm-eval's tasks at every depth: against plain lm-eval, one request at a time, and after a kill."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import redepth
from redepth import RedepthError
from redepth.cli import app
from redepth.evaluation.across_depths import Settings, evaluate_across_depths
from redepth.evaluation.answers import Answer, Answers
from redepth.evaluation.presets import PRESETS, TaskList, narrowed
from redepth.evaluation.scores import paired
from redepth.evaluation.texts import TextSpec
from tests.test_healing import byte_tokenizer

pytest.importorskip("lm_eval")
DEPTHS = (1, 2, 5)
QUESTIONS = ["what is red", "is ice hot", "who eats", "where is up", "why"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Rows of four tasks in their hub schemas."""
    folder = tmp_path_factory.mktemp("rows")
    contents = {
        "arc_easy": [
            {
                "question": q,
                "choices": {"text": [q[-3:], "no", "yes it is"], "label": ["A", "B", "C"]},
                "answerKey": "ABC"[i % 3],
            }
            for i, q in enumerate(QUESTIONS)
        ],
        "sciq": [
            {
                "support": "",
                "question": q,
                "distractor1": "a",
                "distractor2": "bc",
                "distractor3": "d",
                "correct_answer": q[:4],
            }
            for q in QUESTIONS
        ],
        "lambada_openai": [{"text": f"over the {q} end{i}"} for i, q in enumerate(QUESTIONS)],
        "gsm8k": [{"question": q, "answer": f"so\n#### {i}"} for i, q in enumerate(QUESTIONS)],
    }
    for name, content in contents.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


@pytest.fixture(scope="module")
def models(zoo, tmp_path_factory) -> Path:
    """A source, and a recurrent checkpoint made of it, which read 512 tokens."""
    root = tmp_path_factory.mktemp("models")
    shutil.copytree(zoo["qwen3"], root / "source")
    byte_tokenizer().save_pretrained(root / "source")
    config = json.loads((root / "source" / "config.json").read_text())
    (root / "source" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    redepth.convert(root / "source", root / "recurrent", core="2:4", adapter="blend:0.5", state="embed")
    return root


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


def test_texts_are_those_of_generate(models, rows, tmp_path) -> None:
    short = {"gsm8k": {"generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": 9}}}
    asked = TaskList(("gsm8k",), num_fewshot=0, changes=short)
    settings = Settings((1, 3), limit=3, data_dir=rows, batch_size=1)
    found = evaluate_across_depths(str(models / "recurrent"), [asked], [], settings, tmp_path / "out")
    model, tokenizer = redepth.load(models / "recurrent"), byte_tokenizer()
    content = [json.loads(line) for line in (rows / "gsm8k.jsonl").read_text().splitlines()][:3]
    for steps in (1, 3):
        tokens, texts = 0, []
        for row in content:
            ids = tokenizer(f"Question: {row['question']}\nAnswer:", return_tensors="pt")["input_ids"]
            made = model.generate(ids, num_steps=steps, max_new_tokens=9, do_sample=False)
            tokens += made.shape[1] - 1
            texts.append(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).partition("Question:")[0])
        score = next(score for score in found.scores if score.depth == f"r={steps}")
        assert score.tokens_per_answer == tokens / 3
        answers = said_by(found.out / "answers.sqlite")
        assert set(texts) <= answers
        assert score.mean_steps == steps and score.metric == "exact_match"


def said_by(file: Path) -> set[str]:
    import sqlite3

    return {json.loads(said) for (said,) in sqlite3.connect(file).execute("SELECT said FROM answers")}


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


def test_registered_with_lm_eval() -> None:
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import get_model

    from redepth.evaluation.harness import RedepthLM

    assert get_model("redepth") is RedepthLM
    with pytest.raises(RedepthError, match="no loop|without a loop"):
        RedepthLM(tiny_llama(), tokenizer=byte_tokenizer(), num_steps=2)


def test_drafts_are_not_for_lm_eval(models) -> None:
    from redepth.evaluation.harness import RedepthLM

    with pytest.raises(RedepthError, match="draft_steps"):
        RedepthLM(redepth.load(models / "recurrent"), tokenizer=byte_tokenizer(), num_steps=3, draft_steps=1)


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=101)
    )


@pytest.mark.slow
def test_plain_lm_eval_command(models, rows, tmp_path) -> None:
    task = tmp_path / "mine.yaml"
    task.write_text(
        "task: mine\ndataset_path: json\noutput_type: multiple_choice\nvalidation_split: validation\n"
        f"dataset_kwargs: {{data_files: {{validation: {rows / 'sciq.jsonl'}}}}}\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_target: 1\ndoc_to_choice: ['{{distractor1}}', '{{correct_answer}}']\nmetric_list: [{metric: acc}]\n"
    )
    words = [
        "run",
        "--model",
        "redepth",
        "--model_args",
        f"pretrained={models / 'recurrent'},num_steps=3",
        "--device",
        "cpu",
    ]
    words += ["--tasks", str(task), "--batch_size", "2"]
    done = subprocess.run([sys.executable, "-m", "redepth.evaluation", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mine" in done.stdout and "acc" in done.stdout


def test_presets_name_tasks_that_lm_eval_has() -> None:
    from redepth.evaluation.stock_tasks import check_known, is_group

    names = [name for preset in PRESETS.values() for one in preset.lists for name in one.tasks]
    check_known(names)
    assert is_group("mmlu") and is_group("minerva_math") and not is_group("gsm8k_cot")
    math_only = narrowed(PRESETS["retrofit"].lists, ["gsm8k_cot"])
    assert len(math_only) == 1 and math_only[0].tasks == ("gsm8k_cot",) and math_only[0].max_length == 1024
    with pytest.raises(RedepthError, match="not in the preset"):
        narrowed(PRESETS["huginn"].lists, ["boolq"])


def test_tasks_are_found_by_name(rows) -> None:
    from redepth.evaluation.stock_tasks import check_known, folders_of, load_tasks, local_file

    with pytest.raises(RedepthError, match="did you mean 'arc_easy'"):
        check_known(["arc_eazy"])
    assert local_file("gsm8k_cot", rows).name == "gsm8k.jsonl"
    with pytest.raises(RedepthError, match=r"piqa\.jsonl"):
        local_file("piqa", rows)
    assert [Path(folder).name for folder in folders_of("mmlu")] == ["default"]
    assert {Path(folder).name for folder in folders_of("minerva_math")} >= {"minerva_math"}
    (task,) = load_tasks(["gsm8k_cot"], rows, PRESETS["retrofit"].lists[1].changes)
    assert task.doc_to_text({"question": "why"}) == "Q: why\nA: Let's think step by step."
    (task,) = load_tasks(["gsm8k_cot"], rows)
    task.set_config(key="num_fewshot", value=1)
    task.build_all_requests(limit=1)
    assert "15 trees" in task.instances[0].args[0]  # the task's own example, not a row of the file


def test_a_preset_asks_in_a_chat(models, rows, tmp_path) -> None:
    with pytest.raises(RedepthError, match="chat template"):
        redepth.evaluate(
            models / "recurrent", ["gsm8k_cot"], preset="huginn", data_dir=rows, num_steps=(1,), dtype="float32",
            out=tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_prompts_that_do_not_fit_are_refused(models, rows, tmp_path) -> None:
    with pytest.raises(RedepthError, match=r"task 'gsm8k_cot', document 0: \d+ tokens, 256 of them for the answer"):
        redepth.evaluate(models / "recurrent", ["gsm8k_cot"], data_dir=rows, num_steps=(1,), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_answers_outlive_their_table(tmp_path) -> None:
    file = tmp_path / "answers.sqlite"
    first = Answers(file)
    first.keep([("a", Answer((-1.25, True), 7, 2.5)), ("b", Answer("words", 3, 0.0))])
    first.close()
    again = Answers(file)
    assert again.get("a") == Answer((-1.25, True), 7, 2.5) and again.find("b") == Answer("words", 3, 0.0)
    assert again.find("c") is None
    with pytest.raises(KeyError):
        again.get("c")
    (tmp_path / "other").write_text("no database, but a text that is long enough to be seen as one" * 20)
    with pytest.raises(RedepthError, match="no table of answers"):
        Answers(tmp_path / "other")


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("text:a.txt?rowz=2", "rowz"),
        ("text:a.txt?rows=0", "rows must be at least 1"),
        ("text:a.txt?length=x", "length"),
    ],
)
def test_mistakes_in_a_text_spec(spec: str, said: str) -> None:
    with pytest.raises(RedepthError, match=said):
        TextSpec.parse(spec)


def test_rows_by_source(tmp_path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts, sources = ["over and over"] * 6 + ["no"], ["a"] * 3 + ["b"] * 3 + ["short"]
    pq.write_table(pa.table({"text": texts, "source": sources}), tmp_path / "texts.parquet")
    rows = TextSpec.parse(f"text:{tmp_path / 'texts.parquet'}?rows=2&length=8").rows_by_source(byte_tokenizer())
    assert {name: tuple(ids.shape) for name, ids in rows.items()} == {"a": (2, 8), "b": (2, 8)}

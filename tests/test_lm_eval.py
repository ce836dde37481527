"""redepth as lm-eval's model class: texts as `generate` writes them, row by row, drafted where they are deep."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import redepth
from redepth import RedepthError
from redepth.evaluation.across_depths import Settings, evaluate_across_depths
from redepth.evaluation.presets import TaskList
from tests.evaluated import make_models, write_rows
from tests.test_healing import byte_tokenizer

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def models(zoo, tmp_path_factory) -> Path:
    return make_models(zoo, tmp_path_factory.mktemp("models"))


def test_texts_are_those_of_generate(models, rows, tmp_path, monkeypatch) -> None:
    """A deep one is drafted, and each row ends by itself; the texts are those of one request at a time."""
    from redepth.evaluation import harness

    used = []
    drafted = harness.drafted
    monkeypatch.setattr(harness, "drafted", lambda *given: used.append(drafted(*given)) or used[-1])
    stop = "e"
    short = {"gsm8k": {"generation_kwargs": {"until": [stop, "Question:"], "do_sample": False, "max_gen_toks": 9}}}
    asked = TaskList(("gsm8k",), num_fewshot=0, changes=short)
    settings = Settings((1, 3, 9), limit=4, data_dir=rows, batch_size=2)
    found = evaluate_across_depths(str(models / "recurrent"), [asked], [], settings, tmp_path / "out")
    assert {(policy.num_steps, policy.draft_steps) for policy in used} == {(1, None), (3, None), (9, 1)}
    model, tokenizer = redepth.load(models / "recurrent"), byte_tokenizer()
    content = [json.loads(line) for line in (rows / "gsm8k.jsonl").read_text().splitlines()][:4]
    for steps in (1, 3, 9):
        tokens, texts = 0, []
        for row in content:
            ids = tokenizer(f"Question: {row['question']}\nAnswer:", return_tensors="pt")["input_ids"]
            made = model.generate(ids, num_steps=steps, max_new_tokens=9, do_sample=False)
            text, stopped, _ = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).partition(stop)
            texts.append(text)
            tokens += ids.shape[1] + len(text) if stopped else made.shape[1] - 1
        score = next(score for score in found.scores if score.depth == f"r={steps}")
        assert score.tokens_per_answer == tokens / 4
        answers = said_by(found.out / "answers.sqlite")
        assert set(texts) <= answers
        assert score.mean_steps == steps and score.metric == "exact_match"


def test_rows_end_by_themselves() -> None:
    from redepth.evaluation.harness import RowStops

    tokenizer = byte_tokenizer()
    stops = RowStops(tokenizer, ["ab", "!"], start=2)
    rows = torch.tensor([tokenizer(text)["input_ids"] for text in ("abcdxx", "xxcdab", "xx!dxx", "xaxxxa", "xaxxxb")])
    assert stops(rows, None).tolist() == [False, True, True, False, False]
    assert stops(rows[1:2], None).tolist() == [True]
    assert stops.first(rows[1, 2:].tolist()) == 4 and stops.first(rows[2, 2:].tolist()) == 1
    assert stops.first(rows[3, 2:].tolist()) == 4


def said_by(file: Path) -> set[str]:
    import sqlite3

    return {json.loads(said) for (said,) in sqlite3.connect(file).execute("SELECT said FROM answers")}


def test_registered_with_lm_eval() -> None:
    import lm_eval.models  # noqa: F401
    from lm_eval.api.registry import get_model

    from redepth.evaluation.harness import RedepthLM

    assert get_model("redepth") is RedepthLM
    with pytest.raises(RedepthError, match="no loop|without a loop"):
        RedepthLM(tiny_llama(), tokenizer=byte_tokenizer(), num_steps=2)


def test_texts_are_those_of_lm_eval_s_own_class(models) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from redepth.evaluation.harness import RedepthLM

    until = {"until": ["e ", "o"], "max_gen_toks": 12, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (prompt, until), number, task_name="mine")
        for number, prompt in enumerate(["what is red", "over", "where is up and what is down"])
    ]
    tokenizer = byte_tokenizer()
    plain = HFLM(
        AutoModelForCausalLM.from_pretrained(models / "recurrent", num_steps=8), tokenizer=tokenizer, batch_size=2
    )
    expected = plain.generate_until(requests, disable_tqdm=True)
    model = redepth.load(models / "recurrent")
    for options in ({}, {"draft_steps": 3}):
        lm = RedepthLM(model, tokenizer=tokenizer, batch_size=2, num_steps=8, **options)
        assert lm.generate_until(requests, disable_tqdm=True) == expected


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

"""lm-eval's tasks by name, its groups on local files, the presets, and where answers are kept."""

import json
from pathlib import Path

import pytest

import redepth
from redepth import RedepthError
from redepth.evaluation.answers import Answer, Answers
from redepth.evaluation.presets import PRESETS, narrowed
from redepth.evaluation.scores import Score
from redepth.evaluation.texts import TextSpec
from tests.evaluated import make_models, write_rows
from tests.test_healing import byte_tokenizer

pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows"))


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
    from redepth.evaluation.stock_tasks import check_known, folders_of, load_tasks, local_files

    with pytest.raises(RedepthError, match="did you mean 'arc_easy'"):
        check_known(["arc_eazy"])
    assert {name: file.name for name, file in local_files(["gsm8k_cot"], rows).items()} == {"gsm8k_cot": "gsm8k.jsonl"}
    with pytest.raises(RedepthError, match=r"piqa\.jsonl"):
        local_files(["piqa"], rows)
    assert [Path(folder).name for folder in folders_of("mmlu")] == ["default"]
    assert {Path(folder).name for folder in folders_of("minerva_math")} >= {"minerva_math"}
    (task,) = load_tasks(["gsm8k_cot"], rows, PRESETS["retrofit"].lists[1].changes)
    assert task.doc_to_text({"question": "why"}) == "Q: why\nA: Let's think step by step."
    (task,) = load_tasks(["gsm8k_cot"], rows)
    task.set_config(key="num_fewshot", value=1)
    task.build_all_requests(limit=1)
    assert "15 trees" in task.instances[0].args[0]  # the task's own example, not a row of the file


def test_groups_and_tags_read_local_files(rows, zoo, tmp_path) -> None:
    from redepth.evaluation.stock_tasks import data_of, index_of, leaves_of, local_files

    leaves = leaves_of("mmlu_stem")
    assert len(leaves) == 19 and set(leaves) < set(leaves_of("mmlu")) and len(leaves_of("mmlu")) == 57
    assert leaves_of("ai2_arc") == ["arc_challenge", "arc_easy"] and leaves_of("sciq") == ["sciq"]
    with pytest.raises(RedepthError, match=r"no arc_challenge\.jsonl or ai2_arc/ARC-Challenge\.jsonl with"):
        local_files(["ai2_arc"], rows)
    data = tmp_path / "data"
    (data / "mmlu").mkdir(parents=True)
    for number, leaf in enumerate(leaves):
        where, part = data_of(leaf, index_of("mmlu_stem"))
        assert where == "mmlu"
        row = {"question": f"which {number}", "choices": ["no", "yes", "so", "or"], "answer": number % 4}
        (data / "mmlu" / f"{part}.jsonl").write_text(2 * (json.dumps(row) + "\n"))
    content = (rows / "arc_easy.jsonl").read_text()
    (data / "arc_easy.jsonl").write_text(content)
    (data / "arc_challenge.jsonl").write_text(content.partition("\n")[0] + "\n")
    model = make_models(zoo, tmp_path) / "recurrent"
    found = redepth.evaluate(
        model, ["mmlu_stem", "ai2_arc"], num_steps=(1, 2), num_fewshot=0, data_dir=data, out=tmp_path / "out"
    )
    by_task = {score.task: score for score in found.scores if score.depth == "r=2" and score.metric == "acc"}
    assert by_task["mmlu_stem"].answers == 2 * 19 and by_task["arc_challenge"].answers == 1
    assert by_task["mmlu_stem"].value == pytest.approx(sum(by_task[leaf].value for leaf in leaves) / 19)


def test_published_figures_stand_beside_own_ones() -> None:
    from redepth.evaluation.tables import published_table

    published = PRESETS["huginn"].published
    asked = list(PRESETS["huginn"].lists[0].tasks)
    assert list(published.metrics) == asked and PRESETS["huginn"].lists[0].num_fewshot == 0
    assert all(len(row.per_cent) == len(asked) for row in published.rows)
    own = [
        Score("out/mine", f"r={steps}", task, metric, "none", value, None, 9, steps, 1, 1, 1, 1)
        for steps in (4, 8)
        for task, metric, value in (("sciq", "acc", 0.9), ("sciq", "acc_norm", 0.5), ("arc_easy", "acc_norm", 0.25))
    ]
    table = published_table(own, published, limit=9)
    assert table.header == ["model", "depth", "arc_easy, acc_norm", "sciq, acc_norm"]
    assert table.rows[:3] == [
        ["mine", "r=4", "25.00", "50.00"],
        ["mine", "r=8", "25.00", "50.00"],
        ["Huginn-0125", "r=4", "49.07", "80.00"],
    ]
    assert "first 9 documents" in table.note and "2502.05171v2" in table.note
    assert published_table([], published) is None


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

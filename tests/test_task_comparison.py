"""Several models on the problems of a task: one table, paired differences, and nothing asked twice after a kill."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import redepth
from redepth import RedepthError
from redepth.cli import app
from redepth.data.tasks import open_task
from redepth.evaluation import task_scores
from redepth.evaluation.problems import AskedBatch, AskedTask, compact_batches
from redepth.evaluation.tasks import evaluate_task, standard_error, task_accuracy
from redepth.healing.from_scratch import TaskTraining, save_task_model, task_config, train_on_task
from tests.test_healing import byte_tokenizer

SPEC = "task:roots?depth=0-2&nodes=7"


def trained(folder: Path, spec: str, training: TaskTraining) -> Path:
    task = open_task(spec)
    config = task_config(task, width=16, num_steps=training.num_steps or 3)
    model, record = train_on_task(task, config, training)
    return save_task_model(model, task, training, record, folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A looped model and a static one after a few updates."""
    root = tmp_path_factory.mktemp("small")
    trained(root / "looped", SPEC, TaskTraining(updates=30, batch_size=16))
    trained(root / "static", SPEC, TaskTraining("last", num_steps=1, updates=30, batch_size=16))
    return root


@pytest.fixture(scope="module")
def found(small: Path, tmp_path_factory: pytest.TempPathFactory):
    return redepth.evaluate(
        small / "looped",
        num_steps=(1, 3),
        limit=20,
        criterion="argmax-stability",
        exit_threshold=1,
        compare=[f"{small / 'static'}:1"],
        out=tmp_path_factory.mktemp("found") / "out",
    )


def test_every_row_is_that_of_the_model_alone(small: Path, found) -> None:
    alone = {
        "looped": evaluate_task(small / "looped", None, (1, 3), "argmax-stability", 1, limit=20),
        "static": evaluate_task(small / "static", None, (1,), limit=20),
    }
    assert [Path(one.model).name for one in found.by_difficulty] == ["looped", "static"]
    for one in found.by_difficulty:
        expected = alone[Path(one.model).name]
        assert one.as_dict() | {"model": ""} == expected.as_dict()
    rows = {(Path(one.model).name, one.depth, one.filter): one for one in found.scores}
    depths = [("looped", "r=1"), ("looped", "r=3"), ("looped", "argmax-stability"), ("static", "r=1")]
    assert list(rows) == [(*depth, split) for depth in depths for split in ("held-out", "harder")]
    model = redepth.load(small / "looped")
    batches = [batch for batch in compact_batches(open_task(SPEC), 20) if batch.split == "held-out"]
    whole = task_accuracy(model, open_task(SPEC), batches, 2, (3,))
    right = sum(n * row[0] for n, row in zip(whole.answers, whole.accuracy, strict=True)) / sum(whole.answers)
    assert rows["looped", "r=3", "held-out"].value == pytest.approx(right)
    assert rows["looped", "r=3", "held-out"].answers == 20 * 7
    assert rows["looped", "r=3", "held-out"].tokens_per_answer == batches[0].ids.shape[1]
    exits = rows["looped", "argmax-stability", "held-out"]
    steps = model(batches[0].ids, num_steps=3, criterion="argmax-stability", exit_threshold=1).stats["num_steps"]
    assert exits.mean_steps == pytest.approx(steps.float().mean().item())
    assert exits.flops_per_token < rows["looped", "r=3", "held-out"].flops_per_token


def test_differences_are_paired_by_problem(found) -> None:
    table = pq.read_table(found.out / "problems.parquet").to_pandas()
    assert len(table) == 4 * sum(found.by_difficulty[0].answers)
    own = table[table.split == "held-out"]
    names = {Path(name).name: name for name in own.model.unique()}
    one, other = (
        own[(own.model == names[name]) & (own.depth == depth)] for name, depth in (("static", "r=1"), ("looped", "r=3"))
    )
    assert one.problem.tolist() == other.problem.tolist()
    apart = torch.tensor(one.right.to_numpy(float) - other.right.to_numpy(float))
    shown = next(
        each
        for each in found.differences
        if (each.model, each.model_from, each.depth_from, each.filter)
        == (names["static"], names["looped"], "r=3", "held-out")
    )
    assert shown.difference == pytest.approx(apart.mean().item())
    by_hand = standard_error(apart[None], torch.tensor(one.problem.to_numpy())).item()
    assert shown.standard_error == pytest.approx(by_hand)
    # Beside each depth of the first model stands its lead over the control.
    text = (found.out / "table.md").read_text(encoding="utf-8")
    assert "from static" in text and f"{-100 * apart.mean().item():+.1f} ± {100 * by_hand:.1f}" in text


def test_what_is_written(found) -> None:
    names = {file.name for file in found.out.iterdir()}
    pictures = {f"{stem}.{kind}" for stem in ("accuracy", "roots-depth-0-2-nodes-7") for kind in ("png", "svg")}
    assert names == pictures | {"results.json", "table.md", "answers.sqlite", "problems.parquet"}
    written = json.loads((found.out / "results.json").read_text(encoding="utf-8"))
    assert [len(one["accuracy"][0]) for one in written["tasks_by_difficulty"]] == [2, 1]
    (asked,) = written["manifest"]["problems"]
    assert asked == {"task": SPEC, "form": "compact ids", "problems": 20, "seed": 0, "questions": 1}


class Killed(BaseException):
    pass


def test_a_killed_run_asks_nothing_twice(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = task_scores.mark_batch

    def counted(model, batch: AskedBatch, policies):
        if not policies:
            return real(model, batch, policies)
        if len(calls) == stop_at:
            raise Killed
        calls.append(len(batch.ids))
        return real(model, batch, policies)

    monkeypatch.setattr(task_scores, "mark_batch", counted)
    given = {"num_steps": (1, 3), "limit": 70, "criterion": "kl", "compare": [f"{small / 'static'}:1"]}
    stop_at = 5  # in the second batch of the control
    with pytest.raises(Killed):
        redepth.evaluate(small / "looped", out=tmp_path / "out", **given)
    assert len(calls) == 5
    calls.clear()
    stop_at = 10**9
    resumed = redepth.evaluate(small / "looped", out=tmp_path / "out", **given)
    assert len(calls) == 3
    whole = redepth.evaluate(small / "looped", out=tmp_path / "whole", **given)
    assert resumed.scores == whole.scores and resumed.differences == whole.differences
    assert resumed.by_difficulty == whole.by_difficulty
    calls.clear()
    deeper = redepth.evaluate(small / "looped", out=tmp_path / "out", **given | {"num_steps": (1, 2, 3)})
    assert len(calls) == 4  # for the depth that is new
    fresh = redepth.evaluate(small / "looped", out=tmp_path / "fresh", **given | {"num_steps": (1, 2, 3)})
    assert deeper.scores == fresh.scores


def test_words_beside_a_model_without_a_loop(zoo: dict[str, Path], tmp_path: Path) -> None:
    source = Path(shutil.copytree(zoo["qwen3"], tmp_path / "source"))
    byte_tokenizer().save_pretrained(source)
    redepth.convert(source, tmp_path / "recurrent", core="2:4", adapter="blend:0.5", state="embed", dtype="float32")
    found = redepth.evaluate(
        tmp_path / "recurrent",
        ["task:roots?depth=0-1&nodes=5"],
        num_steps=(1, 2),
        limit=6,
        questions=2,
        compare=[source],
        out=tmp_path / "out",
    )
    first, last = found.scores[0], found.scores[-2]
    assert (first.depth, last.depth, last.mean_steps) == ("r=1", "no loop", 0)
    assert first.filter == last.filter == "held-out" and first.answers == 12
    assert found.by_difficulty[1].num_steps == [0]
    # At one step the conversion is its source, answer by answer.
    assert found.by_difficulty[0].accuracy[0][0] == found.by_difficulty[1].accuracy[0][0]
    same = next(one for one in found.differences if (one.depth, one.depth_from) == ("no loop", "r=1"))
    assert (same.difference, same.standard_error) == (0, 0)
    asked = AskedTask.of(tmp_path / "recurrent", SPEC)
    small = trained(tmp_path / "small", SPEC, TaskTraining(updates=1, batch_size=2))
    with pytest.raises(RedepthError, match="asked in words here"):
        asked.check_reads(str(small))


def test_models_that_read_something_else_are_refused(small: Path, tmp_path: Path, zoo: dict[str, Path]) -> None:
    other = trained(tmp_path / "other", "task:iterate?depth=1-2&nodes=7", TaskTraining(updates=1, batch_size=2))
    source = Path(shutil.copytree(zoo["qwen3"], tmp_path / "source"))
    for rival, said in ((other, "knows the words of"), (source, "asked in compact ids here")):
        with pytest.raises(RedepthError, match=said):
            redepth.evaluate(small / "looped", compare=[rival], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["eval", str(small / "looped"), "--compare", f"{small / 'static'}:1", "--limit", "5", "--num-steps", "1,2"]
    run = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert run.exit_code == 0, run.output
    assert "acc, held-out" in run.output and "from static" in run.output and "static r=1" in run.output
    assert (tmp_path / "looped-evaluation" / "accuracy.png").is_file()

"""Exit tests and tasks of others: by import path and by entry point, and never because a checkpoint says so."""

import copy
import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig
from typer.testing import CliRunner

import redepth
from redepth.cli import app
from redepth.data.tasks import open_task
from redepth.errors import RedepthError
from redepth.evaluation.tasks import evaluate_task
from redepth.modeling import DepthPolicy
from redepth.modeling.errors import UserError
from redepth.modeling.exits import EXIT_TESTS, ExitTest, find_exit_test
from redepth.surgery.convert import plan_conversion
from tests.test_healing import byte_tokenizer
from tests.zoo import random_ids

MODULE = """
from dataclasses import dataclass
from redepth.data.tasks import Task
from redepth.modeling.exits import ExitTest

def largest_change(new, old):
    return (new - old).abs().amax(-1)

class Nested:
    strict = ExitTest("whatever", False, 1e9, largest_change, streak=2)

def one_number(new, old):
    return (new - old).norm()

def no_tensor(new, old):
    return 0.0

def of_one(new):
    return new

threshold = 0.5

@dataclass(frozen=True)
class Doubling(Task):
    size: int = 2

    def texts(self, split, count, seed=0, questions=1):
        return []

    def scratchpads(self, split, count, seed=0):
        return []
"""
REGISTERED = """
[redepth.exit_tests]
largest = strangers:largest_change
twice = strangers:largest_change
broken = strangers:missing
kl = strangers:largest_change

[redepth.tasks]
doubling = strangers:Doubling
"""


@pytest.fixture(autouse=True)
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of somebody else's, installed."""
    (tmp_path / "strangers.py").write_text(MODULE)
    (tmp_path / "raises.py").write_text("raise RuntimeError('no licence\\nfound')")
    for name, points in (
        ("strangers", REGISTERED),
        ("others", "[redepth.exit_tests]\ntwice = strangers:one_number\n"),
    ):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("strangers", "raises"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def model(zoo):
    return plan_conversion(zoo["llama"], "0:2", "2:4", "5:6", adapter="blend:0.5", state="noise").model()


@pytest.fixture
def checkpoint(zoo, tmp_path: Path) -> Path:
    redepth.convert(zoo["llama"], tmp_path / "out", core="2:4")
    byte_tokenizer().save_pretrained(tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["strangers:largest_change", "largest"])
def test_a_name_is_what_it_leads_to(model, name: str) -> None:
    def largest_change(new, old):
        return (new - old).abs().amax(-1)

    ids = random_ids(2, 6)
    with torch.no_grad():
        _, first, second = model.states_by_step(ids, 2)
        middling = float(largest_change(second.flatten(0, 1), first.flatten(0, 1)).median())
        keywords = {"num_steps": 6, "exit_threshold": middling}
        got, wanted = (model(ids, criterion=one, **keywords) for one in (name, largest_change))
    assert torch.equal(got.stats["num_steps"], wanted.stats["num_steps"])
    assert len(wanted.stats["num_steps"].unique()) > 1
    assert f"criterion={name} exit_threshold=0.03" in str(DepthPolicy.resolve(model.config, criterion=name))


def test_an_exit_test_keeps_what_it_says(model) -> None:
    policy = DepthPolicy.resolve(model.config, num_steps=6, criterion="strangers:Nested.strict")
    assert (policy.threshold, policy.test.streak, policy.test.name) == (1e9, 2, "strangers:Nested.strict")
    out = model.generate(random_ids(1, 4), policy=policy, max_new_tokens=3, return_dict_in_generate=True)
    assert set(out.stats["num_steps"].flatten().tolist()) == {3}


@pytest.mark.parametrize("known", [[], ["remembers"]])
def test_an_exit_test_of_another_copy_of_the_class_is_one(known: list[str]) -> None:
    """A checkpoint's own modelling files define the class anew, older ones without what has a default."""
    needed = [field.name for field in dataclasses.fields(ExitTest) if field.default is dataclasses.MISSING]
    other = dataclasses.make_dataclass("ExitTest", needed + known, frozen=True)
    test = EXIT_TESTS["entropy-diff" if known else "kl"]
    assert find_exit_test(other(*(getattr(test, name) for name in needed + known))) == test


def test_own_names_keep_their_meaning() -> None:
    assert find_exit_test("kl") is EXIT_TESTS["kl"]
    assert type(open_task("task:roots")).__module__.startswith("redepth")


@pytest.mark.parametrize(
    ("criterion", "said"),
    [
        ("no_such_module:test", "'no_such_module:test' can't be imported: ModuleNotFoundError"),
        ("strangers:missing", "'strangers:missing' can't be imported: AttributeError"),
        ("raises:test", "'raises:test' can't be imported: RuntimeError: no licence$"),
        ("my-package:test", "'my-package:test' can't be imported: ValueError"),
        ("strangers:", "'strangers:' is of type module"),
        ("strangers:threshold", "'strangers:threshold' is of type float"),
        ("strangers:of_one", r"'strangers:of_one' can't be called with \(new, old\)"),
        ("strangers:one_number", r"'strangers:one_number' gave \[\] for 3 tokens"),
        ("strangers:no_tensor", "'strangers:no_tensor' gave float for 3 tokens"),
        ("broken", "'broken', registered as 'strangers:missing', can't be imported"),
        ("twice", "by strangers:largest_change and by strangers:one_number"),
        ("largets", "did you mean 'largest'"),
        ("magic", "twice or package.module:name"),
        (3, "unknown exit criterion 3 is of type int"),
    ],
)
def test_mistakes_are_one_line(model, criterion, said: str) -> None:
    with torch.no_grad(), pytest.raises(UserError, match=said) as caught:
        model(random_ids(1, 3), num_steps=3, criterion=criterion)
    assert "\n" not in str(caught.value)


def test_no_config_names_a_path(model, checkpoint: Path) -> None:
    path, ids = "strangers:largest_change", random_ids(1, 4)
    for name in ("config.json", "generation_config.json"):
        file = checkpoint / name
        before = file.read_text()
        # What is marked as made from the model's config keeps nothing that transformers doesn't know.
        kept = {key: value for key, value in json.loads(before).items() if key != "_from_model_config"}
        file.write_text(json.dumps(kept | {"criterion": path}))
        loaded = redepth.load(checkpoint)
        with torch.no_grad():
            assert isinstance(loaded(ids, num_steps=3).stats["num_steps"], int)
        if name == "generation_config.json":
            with pytest.raises(UserError, match="generation config names exit test 'strangers:largest_change'"):
                loaded.generate(ids, num_steps=3, max_new_tokens=2)
            loaded.generate(ids, num_steps=3, max_new_tokens=2, criterion="kl")
        else:
            loaded.generate(ids, num_steps=3, max_new_tokens=2)
        assert "strangers" not in sys.modules
        file.write_text(before)
    given = GenerationConfig(criterion=path)
    with pytest.raises(UserError, match="pass criterion='strangers:largest_change' yourself"):
        model.generate(ids, given, num_steps=3, max_new_tokens=2)
    assert "strangers" not in sys.modules
    model.generate(ids, given, num_steps=3, max_new_tokens=2, criterion=path)
    # A name that the user installed runs nothing that was not meant for it.
    own = copy.deepcopy(model)
    own.generation_config.criterion = "largest"
    assert own.generate(ids, num_steps=3, max_new_tokens=2).shape == (1, 6)


def test_the_commands(checkpoint: Path) -> None:
    def run(*words: object):
        return CliRunner().invoke(app, [str(word) for word in words])

    path, text = "strangers:largest_change", checkpoint.parent / "text.txt"
    text.write_text("Depth is a knob. " * 20)
    words = (
        "calibrate",
        checkpoint,
        "--data",
        text,
        "--most-steps",
        3,
        "--rows",
        2,
        "--sequence-length",
        24,
        "--device",
        "cpu",
        "--quiet",
    )
    wrong = run(*words, "--criterion", "strangers:missing")
    assert isinstance(wrong.exception, UserError)
    assert json.loads((checkpoint / "config.json").read_text()).get("depth_profile") is None
    done = run(*words, "--criterion", path, "--criterion", "largest")
    assert done.exit_code == 0, done.output
    profile = json.loads((checkpoint / "config.json").read_text())["depth_profile"]
    assert list(profile["thresholds"]) == [*EXIT_TESTS, path, "largest"]
    assert profile["thresholds"][path] == profile["thresholds"]["largest"]
    policy = DepthPolicy.resolve(redepth.load(checkpoint).config, criterion=path, exit_threshold="95%")
    assert policy.threshold == profile["thresholds"][path]["95%"]
    done = run("generate", checkpoint, "hi", "--num-steps", 4, "--max-new-tokens", 3, "--criterion", path, "--json")
    assert done.exit_code == 0, done.output


def test_evaluation_takes_a_path(zoo, tmp_path: Path) -> None:
    from redepth.healing.from_scratch import TaskTraining, save_task_model, task_config, train_on_task

    task, training = open_task("task:roots?depth=0-1&nodes=8"), TaskTraining(updates=1, batch_size=2)
    model, record = train_on_task(task, task_config(task, width=16), training)
    save_task_model(model, task, training, record, tmp_path / "roots")
    path = "strangers:largest_change"
    words = ["eval", str(tmp_path / "roots"), "--num-steps", "1,3", "--limit", "2", "--criterion", path, "--json"]
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["tasks_by_difficulty"][0]["exits"]["criterion"] == path
    with pytest.raises(UserError, match="missing"):
        evaluate_task(tmp_path / "nowhere", criterion="strangers:missing")


def test_tasks_by_entry_point() -> None:
    task = open_task("task:doubling?size=3")
    assert task.size == 3 and open_task(task.spec) == task
    with pytest.raises(RedepthError, match="did you mean 'doubling'"):
        open_task("task:dubling")


def test_a_recorded_path_is_not_imported_unasked(checkpoint: Path) -> None:
    recipe = checkpoint / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "train_on_task:\n  task: task:strangers:Doubling?size=3\n")
    for spec in (None, "task:roots"):
        with pytest.raises(RedepthError, match=re.escape("'task:strangers:Doubling?size=3'; if you trust that code")):
            evaluate_task(checkpoint, spec)
    assert "strangers" not in sys.modules
    with pytest.raises(RedepthError, match="knows the words of"):  # allowed, imported, and no task of a small model
        evaluate_task(checkpoint, "task:strangers:Doubling")

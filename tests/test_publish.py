"""Publishing, against a hub that keeps what it is sent in memory."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError
from typer.testing import CliRunner

import redepth
from redepth import RedepthError, api
from redepth.cli import app
from redepth.evaluation.calibrate import calibrate
from tests.test_healing import byte_tokenizer
from tests.zoo import random_ids


class Hub:
    """What HfApi does of what publishing needs."""

    def __init__(self, fails: Exception | None = None, **_: object) -> None:
        self.fails, self.made, self.files, self.private = fails, [], {}, None

    def whoami(self) -> dict:
        if self.fails is not None:
            raise self.fails
        return {"name": "you"}

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> SimpleNamespace:
        assert exist_ok
        self.made.append((name, private))
        return SimpleNamespace(repo_id=name, __str__=lambda self: name)

    def create_commit(self, repo_id: str, operations: list, commit_message: str) -> None:
        for one in operations:
            with one.as_file() as content:
                self.files[one.path_in_repo] = content.read()


@pytest.fixture
def hub(monkeypatch) -> Hub:
    made = Hub()
    monkeypatch.setattr("redepth.checkpoint.publish.HfApi", lambda **_: made)
    return made


@pytest.fixture(scope="module")
def finished(zoo, tmp_path_factory) -> Path:
    """Verified, calibrated, with a licence, and a record that says it was healed."""
    root = tmp_path_factory.mktemp("published")
    shutil.copytree(zoo["qwen3"], root / "source")
    byte_tokenizer().save_pretrained(root / "source")
    (root / "source" / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    out = root / "out"
    redepth.convert(root / "source", out, core="2:4")
    with pytest.MonkeyPatch.context() as patch:  # gathering Python's own documentation takes seconds
        patch.setattr("redepth.surgery.verify.python_docs", lambda held_out: ["depth after depth. " * 40])
        assert redepth.verify(out).passed
    calibrate(out, random_ids(2, 12), "noise", most_steps=3)
    record = {"data": "letters", "sources": [], "tokens": 9, "loss_before": {"1": 3.0}, "loss_after": {"1": 2.0}}
    (out / "healing.json").write_text(json.dumps(record))
    (out / "notes.txt").write_text("mine")
    return out


def test_a_dry_run_sends_and_writes_nothing(finished: Path, hub: Hub) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.rglob("*")}
    run = CliRunner().invoke(app, ["publish", str(finished), "you/deeper", "--dry-run"])
    assert run.exit_code == 0, run.output
    assert "model.safetensors" in run.output and 'from_pretrained("you/deeper"' in run.output
    assert "license: mit" in run.output and "notes.txt" not in run.output
    assert {file: file.stat().st_mtime_ns for file in finished.rglob("*")} == before
    assert hub.made == []


def test_everything_of_ours_goes_up(finished: Path, hub: Hub) -> None:
    plan = api.publish(finished, "you/deeper", private=True)
    assert hub.made == [("you/deeper", True)] and plan.lacks == [] and plan.license == "mit"
    assert hub.files.keys() == plan.files.keys()
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "recipe.yaml",
        "model.py",
    } <= hub.files.keys()
    assert hub.files["model.safetensors"] == (finished / "model.safetensors").read_bytes()
    assert b'from_pretrained("you/deeper"' in hub.files["README.md"] and b"## Healing" in hub.files["README.md"]
    assert json.loads(hub.files["config.json"])["depth_profile"]["num_steps"] >= 1
    assert "notes.txt" not in hub.files and not any(name.startswith(".") for name in hub.files)


@pytest.mark.parametrize(("file", "said"), [("healing.json", "not healed"), ("verification.json", "not verified")])
def test_what_is_unfinished_stays_here(finished: Path, hub: Hub, tmp_path: Path, file: str, said: str) -> None:
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / file).unlink()
    with pytest.raises(RedepthError, match=said):
        api.publish(tmp_path / "out", "you/deeper")
    assert hub.made == []
    api.publish(tmp_path / "out", "you/deeper", even_unfinished=True)
    assert hub.made == [("you/deeper", False)]


def test_no_licence_is_unfinished(finished: Path, hub: Hub, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "out")
    recipe = tmp_path / "out" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("license: mit", "license: null"))
    with pytest.raises(RedepthError, match="names no licence"):
        api.publish(tmp_path / "out", "you/deeper")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LocalTokenNotFoundError("no token"), "hf auth login"),
        (httpx.ConnectError("no route"), "can't be reached: no route"),
        (ConnectionError("offline"), "can't be reached: offline"),
    ],
)
def test_the_hubs_mistakes_are_one_line(finished: Path, hub: Hub, error: Exception, said: str) -> None:
    hub.fails = error
    with pytest.raises(RedepthError, match=said):
        api.publish(finished, "you/deeper")
    assert hub.files == {}

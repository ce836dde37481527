"""A checkpoint folder loses nothing: not its owner's files, not a source, not the checkpoint that is being replaced."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import redepth
from redepth.checkpoint import folder as folder_module
from redepth.checkpoint.folder import MANIFEST_FILE, CheckpointFolder
from redepth.checkpoint.lock import WORK_FOLDER
from redepth.errors import RedepthError
from redepth.surgery.create import create
from redepth.surgery.presets import preset_config

Content = dict[str, str]
OLD = {
    "config.json": '{"model_type": "huginn_raven", "norm_placement": "pre"}',
    "model.safetensors": "old weights",
    "recipe.yaml": "heal: {}",
}
NEW = {
    "config.json": '{"model_type": "huginn_raven", "n": 1}',
    "model.safetensors.index.json": '{"weight_map": {"a": "model-00001-of-00001.safetensors"}}',
    "model-00001-of-00001.safetensors": "new weights",
    "runs/curve": "0.1",
}


class _Killed(BaseException):
    """As SIGKILL, nothing that is written for exceptions may help."""


def fill(place: Path, content: Content) -> None:
    for name, text in content.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)


def content_of(place: Path, but: tuple[str, ...] = (MANIFEST_FILE,)) -> Content:
    files = (file for file in place.rglob("*") if file.is_file())
    found = {file.relative_to(place).as_posix(): file.read_text(errors="replace") for file in files}
    return {name: text for name, text in found.items() if name not in but}


def replace(place: Path, content: Content, **options) -> None:
    with CheckpointFolder(place).replacing(**options) as stage:
        fill(stage, content)


def fill_a_full_disk(place: Path) -> None:
    with CheckpointFolder(place).replacing(overwrite=True) as stage:
        fill(stage, NEW)
        raise OSError(28, "No space left on device")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    place = tmp_path / "out"
    replace(place, OLD)
    return place


def test_only_what_redepth_wrote_is_replaced(out: Path) -> None:
    mine = {
        ".git/HEAD": "ref",
        "eval/notes.txt": "mine",
        "other.safetensors": "a stranger's",
        "model-00009-of-00009.safetensors": "x",
    }
    fill(out, mine)
    replace(out, NEW, overwrite=True)
    assert content_of(out) == NEW | mine
    assert json.loads((out / MANIFEST_FILE).read_text())["files"] == sorted(NEW)
    replace(out, OLD, overwrite=True)
    assert content_of(out) == OLD | mine
    assert not (out / "runs").exists()


def test_an_update_keeps_the_rest_and_removes_stale_weights(out: Path) -> None:
    fill(out, {"notes.txt": "mine"})
    with CheckpointFolder(out).updating() as stage:
        fill(stage, {name: text for name, text in NEW.items() if name.startswith("model")})
    kept = {name: text for name, text in OLD.items() if name != "model.safetensors"}
    assert content_of(out) == kept | {"notes.txt": "mine"} | {n: t for n, t in NEW.items() if n.startswith("model")}
    with CheckpointFolder(out).updating() as stage:
        fill(stage, {"verification.json": "{}"})
    assert (out / "model-00001-of-00001.safetensors").exists()


def test_a_published_checkpoint_is_updated_where_it_lies(tmp_path: Path) -> None:
    published = {"config.json": '{"model_type": "huginn_raven"}', "model.safetensors": "old", "raven_model.py": "code"}
    fill(tmp_path / "out", published)
    with CheckpointFolder(tmp_path / "out").updating() as stage:
        fill(stage, NEW)
    assert content_of(tmp_path / "out") == NEW | {"raven_model.py": "code"}


def test_a_file_that_is_in_the_way_is_named_and_kept(out: Path) -> None:
    fill(out, {"tokenizer.json": "mine"})
    before = content_of(out, ())
    with pytest.raises(RedepthError, match=r"tokenizer\.json is in the way"):
        replace(out, NEW | {"tokenizer.json": "another"}, overwrite=True)
    assert content_of(out, ()) == before
    replace(out, NEW | {"tokenizer.json": "mine"}, overwrite=True)


def test_a_checkpoint_without_a_manifest_is_known_by_its_names(out: Path) -> None:
    """As an earlier version wrote them."""
    (out / MANIFEST_FILE).unlink()
    fill(out, {"blocks.py": "old code", "notes.txt": "mine", "README.md": "an owner's card"})
    replace(out, NEW, overwrite=True)
    assert content_of(out) == NEW | {"notes.txt": "mine", "README.md": "an owner's card"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"notes.txt": "mine"}, "was not written by redepth"),
        ({"config.json": '{"model_type": "llama"}', "model.safetensors": "x"}, "was not written by redepth"),
        ({"config.json": '{"model_type": "huginn_raven"}'}, "was not written by redepth"),  # as published
        ({"config.json": "no json"}, "was not written by redepth"),
        (OLD | {"healing/before.json": "{}"}, "unfinished healing run"),
    ],
)
def test_what_is_no_checkpoint_of_ours_is_refused(tmp_path: Path, content: Content, message: str) -> None:
    fill(tmp_path / "out", content)
    with pytest.raises(RedepthError, match=message):
        replace(tmp_path / "out", NEW, overwrite=True)
    with pytest.raises(RedepthError, match="already exists"):
        replace(tmp_path / "out", NEW)
    assert content_of(tmp_path / "out") == content


def test_a_file_and_a_loop_of_links_are_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for name, message in (("out", "is a file"), ("out/inner", "Not a directory"), ("loop", "loop")):
        with pytest.raises(RedepthError, match=message):
            replace(tmp_path / name, NEW, overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_link_is_written_through(out: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "new link").symlink_to(tmp_path / "elsewhere" / "new")
    replace(tmp_path / "link", NEW, overwrite=True)
    replace(tmp_path / "new link", NEW)
    assert (tmp_path / "link").is_symlink()
    assert content_of(out) == content_of(tmp_path / "elsewhere" / "new") == NEW


def test_the_folder_one_stands_in_and_a_way_round(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(out)
    (out / "up").mkdir()
    replace(Path("."), NEW, overwrite=True)
    replace(Path("up/.."), NEW, overwrite=True)
    assert content_of(Path.cwd()) == NEW


def test_a_failed_block_leaves_everything_as_it_was(out: Path, tmp_path: Path) -> None:
    before = content_of(out, ())
    for place in (out, tmp_path / "a" / "b" / "fresh"):
        with pytest.raises(OSError, match="No space"):
            fill_a_full_disk(place)
    assert content_of(out, ()) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Either the old checkpoint or the new one is there when the folder is next opened, and no trace of the other."""
    outcomes = set()
    for moment in range(40):
        place = tmp_path / str(moment)
        replace(place, OLD)
        fill(place, {"notes.txt": "mine"})
        left = moment

        def counted(call, killed_before: bool):
            def run(*args, **kwargs):
                nonlocal left
                left -= 1
                if left < 0 and killed_before:
                    raise _Killed
                result = call(*args, **kwargs)
                if left < 0:
                    raise _Killed
                return result

            return run

        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((os, "replace"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")):
                patch.setattr(owner, name, counted(getattr(owner, name), moment % 2 == 0))
            patch.setattr(shutil, "rmtree", counted(lambda *args, **kwargs: None, False))
            patch.setattr(folder_module, "locked", _locked_by_the_dead)
            try:
                replace(place, NEW, overwrite=True)
                done = True
            except _Killed:
                done = False
        CheckpointFolder(place).settle()
        with CheckpointFolder(place).locked():
            pass
        found = content_of(place)
        assert found in (OLD | {"notes.txt": "mine"}, NEW | {"notes.txt": "mine"})
        assert not (place / WORK_FOLDER).exists()
        outcomes.add((done, "new weights" in found.values()))
    assert outcomes == {(False, False), (False, True), (True, True)}


def _locked_by_the_dead(place: Path):
    """A lock whose end never comes, as after SIGKILL; the kernel drops it."""
    from contextlib import contextmanager

    @contextmanager
    def lock():
        (place / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
        yield True

    return lock()


def test_debris_of_earlier_versions_is_cleared(tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(tmp_path / ".out.old.abcdefgh" / "out", OLD)
    fill(tmp_path / ".out.new.12345678", NEW)
    fill(tmp_path / ".out.notes", {"a": "mine"})
    with CheckpointFolder(out).locked():
        pass
    assert content_of(out) == OLD
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".out.notes", "out"]


HOLD = """
import sys
from redepth.checkpoint.lock import locked
from pathlib import Path
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_a_second_process_is_told_who_holds_the_folder(out: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(RedepthError, match=f"is being written by process {holder.pid} on .*wait for it") as told:
        replace(out, NEW, overwrite=True)
    assert "\n" not in str(told.value)
    holder.kill()
    holder.communicate()
    assert (out / WORK_FOLDER / "owner.json").exists()  # nobody could remove it, and it does not matter
    replace(out, NEW, overwrite=True)
    assert not (out / WORK_FOLDER).exists()


def test_a_thread_locks_again_what_it_holds_and_others_do_not(out: Path) -> None:
    told: list[str] = []

    def other() -> None:
        try:
            replace(out, NEW, overwrite=True)
        except RedepthError as error:
            told.append(str(error))

    folder = CheckpointFolder(out)
    with folder.locked():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert f"process {os.getpid()}" in told[0]
        replace(out, NEW, overwrite=True)
    assert content_of(out) == NEW


def test_what_the_end_needs_is_known_at_the_start(tmp_path: Path) -> None:
    CheckpointFolder(tmp_path / "a" / "b").check_writable(1000)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RedepthError, match="needs 1000000000.0 GB, but its disk has"):
        CheckpointFolder(tmp_path / "out").check_writable(10**18)
    with pytest.raises(RedepthError, match="can't be written"):
        CheckpointFolder("/proc/nothing/out").check_writable()
    assert list(tmp_path.iterdir()) == []


def test_source_and_out_stay_apart(zoo, tmp_path: Path) -> None:
    source = Path(shutil.copytree(zoo["llama"], tmp_path / "models" / "source"))
    (tmp_path / "link").symlink_to(source)
    before = content_of(tmp_path)
    for out in (source, source / "inner", tmp_path / "models", tmp_path / "link", source / ".." / "source"):
        with pytest.raises(RedepthError, match="contain one another"):
            redepth.convert(source, out, core="2:4", overwrite=True)
    with pytest.raises(RedepthError, match="was not written by redepth"):
        create(preset_config("nano"), source, overwrite=True)
    assert content_of(tmp_path) == before


def test_overwriting_a_conversion_keeps_what_is_not_redepths(zoo, tmp_path: Path) -> None:
    out = tmp_path / "out"
    redepth.convert(zoo["qwen3"], out, core="2:4", max_shard_size="20KB")
    fill(out, {"eval/notes.txt": "mine"})
    shards = {file.name for file in out.glob("model-*.safetensors")}
    redepth.convert(zoo["qwen3"], out, core="1:3", overwrite=True)
    assert len(shards) > 1 and not list(out.glob("model-*"))
    assert (out / "eval" / "notes.txt").read_text() == "mine"
    assert redepth.verify(out, zoo["qwen3"]).passed
    files = json.loads((out / MANIFEST_FILE).read_text())["files"]
    assert {file.name for file in out.iterdir()} == {*files, MANIFEST_FILE, "eval"}

"""A checkpoint folder as redepth keeps it: locked while it is written, written whole or not at all, with its records."""

import filecmp
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from redepth.errors import RedepthError, first_line

from .lock import WORK_FOLDER, locked

RECIPE_FILE = "recipe.yaml"
VERIFICATION_FILE = "verification.json"
HEALING_FILE = "healing.json"
HEALING_LOG_FILE = "healing-log.jsonl"
EVALUATION_FILE = "evaluation.json"
QUANTIZATION_FILE = "quantization.json"
FAMILY_FILE = "family.yaml"
CARD_FILE = "README.md"
MANIFEST_FILE = ".redepth.json"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DEFAULT_SHARD_SIZE = "1GB"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
RECURRENT_MODEL_TYPE = "huginn_raven"
# What is put into place waits in STAGE; JOURNAL says that it is complete, and what has to go when it takes its place.
STAGE, JOURNAL = "new", "commit.json"
# What recipe.yaml says of a conversion, and how. Keys that some conversions alone have are not among them.
CONVERT_KEYS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("source", "prelude", "core", "coda", "adapter", "state", "dtype"), (str,)),
    "tie": (bool,),
    "seed": (int,),
}
RECORD_FILES = {RECIPE_FILE, VERIFICATION_FILE, HEALING_FILE, HEALING_LOG_FILE, EVALUATION_FILE, QUANTIZATION_FILE}
# What redepth wrote before there was a manifest, besides records, weights and modelling files.
KNOWN_FILES = {
    CONFIG_FILE,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
}


class CheckpointFolder:
    """A folder that holds, or will hold, a checkpoint.

    Everything new is written into `.redepth/new` inside the folder. When it is complete a journal is written, and then
    each file is renamed into its place. The folder itself is never renamed, since that fails for a mount point and for the
    directory that a shell stands in, and would take along what is not redepth's. A process killed before the journal is
    there leaves the folder as it was; after that, whatever opens the folder next finishes the renames. Only files that
    redepth wrote are replaced or removed; `.redepth.json`, the manifest, lists them.

    Attributes:
        path: absolute, with links followed: a link is written through, never replaced.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            self.path = Path(path).expanduser().resolve()
        except (OSError, RuntimeError) as error:
            raise RedepthError(f"{path} is no usable path: {first_line(error)}") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against other processes, after clearing up what a killed one left.

        Raises:
            RedepthError: where another process holds it (it is named), or it can't be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RedepthError(f"{self.path} is a file, not a folder; give another folder")
        _recover_renamed(self.path)
        with locked(self.path) as is_outermost:
            if is_outermost:
                self._finish_or_sweep()
            yield

    def settle(self) -> None:
        """For readers: finish what a killed process had begun to put into place, where that is so."""
        if (self.path / WORK_FOLDER / JOURNAL).exists():
            with self.locked():
                pass

    def check_writable(self, needed: int = 0) -> None:
        """What the end of a run needs, asked at its start: the folder can be locked and written, and has enough space.

        Args:
            needed: bytes.

        Raises:
            RedepthError: where that is not so.
        """
        with self.locked():
            free = shutil.disk_usage(self.path).free
            if free < needed:
                raise RedepthError(
                    f"{self.path} needs {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB left; make room first"
                )

    def check_apart(self, *sources: Path) -> None:
        """Refuse to write where something is read from.

        Raises:
            RedepthError: where this folder is a source, contains one, or lies in one.
        """
        for source in sources:
            read = Path(source).expanduser().resolve()
            if self.path == read or self.path in read.parents or read in self.path.parents:
                raise RedepthError(
                    f"{self.path} and the source {read} contain one another; give another folder to write"
                )

    def check_replaceable(self, overwrite: bool) -> None:
        """Refuse a folder that a new checkpoint must not replace.

        Raises:
            RedepthError: for a file, a folder in use without `overwrite`, one that redepth did not write, or one with an
                unfinished healing run.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise RedepthError(f"{self.path} is a file, not a folder; give another folder")
        entries = {entry.name for entry in self.path.iterdir()} - {WORK_FOLDER}
        if entries and not overwrite:
            raise RedepthError(f"{self.path} already exists; give another folder or --overwrite")
        if entries and not self.is_ours():
            raise RedepthError(
                f"{self.path} was not written by redepth, so --overwrite does not replace it; give another folder"
            )
        if (self.path / "healing" / "before.json").exists():
            raise RedepthError(
                f"{self.path} holds an unfinished healing run; finish it, or remove its folder 'healing' first"
            )

    def is_ours(self) -> bool:
        """Whether redepth wrote this folder: by its manifest, or by a switch that no published config.json has."""
        return (self.path / MANIFEST_FILE).exists() or "norm_placement" in self._recurrent_config()

    def _recurrent_config(self) -> dict[str, Any]:
        """What config.json holds, if it is a recurrent checkpoint's."""
        config = _read_quietly(self.path / CONFIG_FILE)
        return config if isinstance(config, dict) and config.get("model_type") == RECURRENT_MODEL_TYPE else {}

    def owned(self) -> set[str]:
        """Names of the files that redepth may replace or remove, relative to the folder, with `/` between parts.

        They are those that the manifest lists and the weights that the checkpoint itself names. Without a manifest, as in
        checkpoints that an earlier version wrote or that come from the hub, they are the files of known names.
        """
        manifest = _read_quietly(self.path / MANIFEST_FILE)
        names = set(self.weights()) | RECORD_FILES
        if isinstance(manifest, dict) and isinstance(manifest.get("files"), list):
            names |= {str(name) for name in manifest["files"]} | {MANIFEST_FILE}
        elif self._recurrent_config():
            names |= KNOWN_FILES | self._modelling_files()
            if "convert" in read_recipe(self.path):
                names.add(CARD_FILE)
        return {name for name in names if stays_inside(name)}

    def weights(self) -> list[str]:
        """The weight files that the checkpoint consists of, and their index."""
        names = [name for name in (WEIGHTS_FILE, INDEX_FILE) if (self.path / name).exists()]
        index = _read_quietly(self.path / INDEX_FILE)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        listed = {str(file) for file in shards.values()} if isinstance(shards, dict) else set()
        return names + sorted(name for name in listed if stays_inside(name))

    @contextmanager
    def replacing(self, overwrite: bool = False, sources: Iterable[Path] = ()) -> Iterator[Path]:
        """A folder to write a whole new checkpoint into, which is put into place when the block succeeds.

        Of what lay here before, the files that redepth wrote are replaced or removed, and all others stay. Nothing changes
        when the block fails.

        Args:
            overwrite: allow a checkpoint that redepth wrote to be here already.
            sources: what the new checkpoint is made of.

        Raises:
            RedepthError: as `check_apart`, `check_replaceable` and `locked`, or where a file is in the way that redepth did
                not write.
        """
        self.check_apart(*sources)
        with self.locked():
            self.check_replaceable(overwrite)
            with self._staged(lambda staged: self.owned() - staged) as stage:
                yield stage

    @contextmanager
    def updating(self, outdated: Iterable[str] = ()) -> Iterator[Path]:
        """A folder to write new versions of some files into, which are put into place together when the block succeeds.

        All others stay, but where new weights are written the old ones go.

        Args:
            outdated: names of records that are no longer true, and are removed as well.

        Raises:
            RedepthError: as `locked`, or where a file is in the way that redepth did not write.
        """

        def stale(staged: set[str]) -> set[str]:
            weights = set(self.weights()) if any(map(is_weights, staged)) else set()
            return (weights | set(outdated)) - staged

        with self.locked(), self._staged(stale) as stage:
            yield stage

    @contextmanager
    def _staged(self, stale: Callable[[set[str]], set[str]]) -> Iterator[Path]:
        work = self.path / WORK_FOLDER
        stage = work / STAGE
        if stage.exists():
            raise RuntimeError(f"{self.path} is already being written by this process")
        stage.mkdir()
        try:
            yield stage
            staged, owned = _files_in(stage), self.owned()
            for name in sorted(staged - owned):
                self._check_free(name, stage / name)
            removed = {name for name in stale(staged) if (self.path / name).is_file()}
            kept = {name for name in owned - removed if (self.path / name).is_file()}
            manifest = {"redepth": version("redepth"), "files": sorted((staged | kept) - {MANIFEST_FILE})}
            write_json(stage / MANIFEST_FILE, manifest)
            write_json(work / JOURNAL, {"remove": sorted(removed - {MANIFEST_FILE})})
        except BaseException:
            if not (work / JOURNAL).exists():
                shutil.rmtree(stage, ignore_errors=True)
            raise
        self._put_into_place()

    def _check_free(self, name: str, new: Path) -> None:
        place = self.path / name
        if os.path.lexists(place) and not (place.is_file() and filecmp.cmp(place, new, shallow=False)):
            raise RedepthError(f"{place} is in the way and was not written by redepth; move it elsewhere first")

    def _finish_or_sweep(self) -> None:
        """After a killed process: put into place what was complete, and remove what was not."""
        work = self.path / WORK_FOLDER
        if (work / JOURNAL).exists():
            self._put_into_place()
        shutil.rmtree(work / STAGE, ignore_errors=True)
        partial_of(work / JOURNAL).unlink(missing_ok=True)

    def _put_into_place(self) -> None:
        """Each file by a rename, config.json last. It can be repeated from any point at which it was interrupted."""
        work = self.path / WORK_FOLDER
        stage = work / STAGE
        journal: dict[str, list[str]] = read_json(work / JOURNAL) or {}
        for name in sorted(_files_in(stage), key=lambda name: (name == CONFIG_FILE, name)):
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(stage / name, self.path / name)
        for name in journal.get("remove", []):
            (self.path / name).unlink(missing_ok=True)
            for parent in (self.path / name).parents:
                if parent == self.path or not parent.is_dir() or any(parent.iterdir()):
                    break
                parent.rmdir()
        (work / JOURNAL).unlink()
        shutil.rmtree(stage, ignore_errors=True)  # of the empty folders that are left

    def _modelling_files(self) -> set[str]:
        """The modules that config.json's `auto_map` names, and those that redepth exports today."""
        auto_map = self._recurrent_config().get("auto_map")
        named = auto_map.values() if isinstance(auto_map, dict) else ()
        exported = {file.name for file in (Path(__file__).parent.parent / "modeling").glob("*.py")} - {"__init__.py"}
        return exported | {f"{value.partition('.')[0]}.py" for value in named if isinstance(value, str)}


def is_weights(name: str) -> bool:
    """Whether a checkpoint's file of that name holds weights, or says which do."""
    return name in (WEIGHTS_FILE, INDEX_FILE) or SHARD.fullmatch(name) is not None


def _recover_renamed(out: Path) -> None:
    """Clear up beside a folder that an earlier version of redepth was replacing by two renames when it was killed.

    What was put aside is put back, and what was not finished is removed.
    """
    for left in out.parent.glob(f".{glob.escape(out.name)}.*"):
        kind = re.fullmatch(r"\.(old|new)\.\w{8}", left.name.removeprefix(f".{out.name}"))
        if kind is not None and left.is_dir() and not left.is_symlink():
            if kind[1] == "old" and not out.exists() and (left / out.name).exists():
                os.replace(left / out.name, out)
            shutil.rmtree(left)


def _files_in(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir()}


def stays_inside(name: str) -> bool:
    """Whether a file name, as a record in a checkpoint gives it, means a file in the folder."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _read_quietly(file: Path) -> Any | None:
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None


def read_recipe(folder: Path) -> dict[str, Any]:
    """The record of how the checkpoint was made, with sections `convert` and `heal`; empty where there is none.

    Raises:
        RedepthError: for a file that is no YAML table, or whose section `convert` is not whole.
    """
    file = folder / RECIPE_FILE
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RedepthError(f"{file} is no readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not all(isinstance(section, dict | list) for section in content.values()):
        raise RedepthError(f"{file} is not the record that redepth writes, a table of sections; restore or remove it")
    if "convert" in content:
        for key, kinds in CONVERT_KEYS.items():
            value = content["convert"].get(key)
            if not isinstance(value, kinds):
                raise RedepthError(f"{file}: convert.{key} is {value!r}, not what redepth writes; restore or remove it")
    return content


def write_recipe(folder: Path, recipe: dict[str, Any]) -> None:
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")


def read_json(file: Path) -> Any | None:
    """The file's content, or None where there is no such file.

    Raises:
        RedepthError: for a file that is no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except ValueError as error:
        raise RedepthError(f"{file} is no readable JSON: {first_line(error)}") from None


def partial_of(file: Path) -> Path:
    """The name under which a file is written before it is complete."""
    return file.with_name(f".{file.name}.partial")


def write_json(file: Path, content: Any) -> None:
    """Write a file next to its place, then rename it, so that a reader never sees half a file."""
    beside = partial_of(file)
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    beside.replace(file)


def write_jsonl(file: Path, records: list[dict[str, Any]]) -> None:
    """One record a line."""
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The records of a file with one a line; none where there is no such file.

    Raises:
        RedepthError: for a line that is no JSON.
    """
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    except ValueError as error:
        raise RedepthError(f"{file} is no readable JSON, line by line: {first_line(error)}") from None

"""The wheel holds everything that redepth needs, and works where the source tree is not."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_healing import byte_tokenizer

ROOT = Path(__file__).parent.parent
NEEDED = ("pyproject.toml", "README.md", "LICENSE", "src")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the source distribution, in a copy of the tree, with what is installed here."""
    tree = tmp_path_factory.mktemp("tree")
    for name in NEEDED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tree / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--skip-dependency-check", str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert list((tree / "dist").glob("redepth-*.tar.gz"))
    return next((tree / "dist").glob("redepth-*.whl"))


@pytest.mark.slow
def test_the_wheel_is_complete(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("redepth/")}
    package = ROOT / "src" / "redepth"
    wanted = [file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert held == {f"redepth/{file.relative_to(package).as_posix()}" for file in wanted}


@pytest.mark.slow
def test_the_installed_wheel_converts_and_generates(wheel: Path, zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo["qwen3"], tmp_path / "source")
    byte_tokenizer().save_pretrained(tmp_path / "source")
    place = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", "from redepth.cli import main; main()", *words],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(place)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "retrofit" in run("--help")
    run("convert", "source", "out", "--core", "2:4", "--quiet")
    assert "a depth" in run("generate", "out", "a depth", "--num-steps", "2", "--max-new-tokens", "3")
    where = subprocess.run(
        [sys.executable, "-c", "import redepth; print(redepth.__file__)"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(place)

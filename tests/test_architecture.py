"""Arrows point one way: cli → verbs → modeling."""

import ast
from pathlib import Path

import redepth

PACKAGE = Path(redepth.__file__).parent
MODELING_MAY_IMPORT = {
    "torch",
    "transformers",
    "safetensors",
    "difflib",
    "json",
    "collections",
    "contextlib",
    "dataclasses",
    "functools",
    "inspect",
    "math",
    "operator",
    "re",
    "typing",
}


def imports_of(file: Path) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.level))
    return found


def test_modelling_files_stand_alone() -> None:
    for file in (PACKAGE / "modeling").glob("*.py"):
        for module, level in imports_of(file):
            assert level == 1 or module.split(".")[0] in MODELING_MAY_IMPORT, f"{file.name} imports {module}"
            assert level != 1 or "." not in module, f"{file.name} imports {module}; exported files lie flat"


def test_nothing_imports_the_command_line() -> None:
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name != "cli" and file.name != "__main__.py":
            assert not any(module.startswith("redepth.cli") for module, _ in imports_of(file)), file


def test_surgery_does_not_know_healing() -> None:
    for file in (PACKAGE / "surgery").glob("*.py"):
        assert not any(module.startswith("redepth.healing") for module, _ in imports_of(file)), file


def test_text_does_not_know_healing() -> None:
    """Nor does `redepth plan`, which would import Trainer with it."""
    for file in [*(PACKAGE / "data").rglob("*.py"), PACKAGE / "runtime.py", PACKAGE / "cli" / "plan.py"]:
        assert not any("healing" in module for module, _ in imports_of(file)), file

"""The tree of files in design.md: a line for each, from its docstring or first comment. `make tree` writes it anew."""

import ast
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "design.md"
BEGIN, END = "<!-- made by docs/tree.py -->", "<!-- end of the tree -->"
FOLDERS = {
    "src/redepth": "the package",
    "recipes": "healing and retrofit recipes",
    "examples": "what `make demo` and `make demo-griffin` run",
    "benchmarks": "what printed the figures in these pages",
}


def said_by(file: Path) -> str:
    """The first paragraph of a module's docstring, or of the comment that a YAML file begins with."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    elif file.suffix in (".cpp", ".h"):
        text = text.partition("\n//\n")[0].replace("//", "")
    else:
        text = "\n".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    return " ".join(text.partition("\n\n")[0].split())


def lines_of(folder: Path, name: str, says: str, depth: int) -> list[str]:
    """A folder's line and, below it, its files' and then its packages', in Markdown's nested lists."""

    def line(level: int, name: str, says: str) -> str:
        indent = "  " * level
        return textwrap.fill(
            f"- `{name}`: {says}",
            125,
            initial_indent=indent,
            subsequent_indent=indent + "  ",
            break_long_words=False,
            break_on_hyphens=False,
        )

    lines = [line(depth, f"{name}/", says)]
    for file in sorted(file for file in folder.iterdir() if file.suffix in (".py", ".yaml", ".cpp", ".h")):
        if file.name != "__init__.py":
            lines.append(line(depth + 1, file.name, said_by(file)))
    for package in sorted(file.parent for file in folder.glob("*/__init__.py")):
        lines += lines_of(package, package.name, said_by(package / "__init__.py"), depth + 1)
    return lines


def tree() -> str:
    return "\n".join(line for name, says in FOLDERS.items() for line in lines_of(ROOT / name, name, says, 0))


def written(page: str) -> str:
    """The tree that the page holds."""
    return page.partition(BEGIN)[2].partition(END)[0].strip()


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tree()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")

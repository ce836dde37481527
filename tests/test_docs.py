"""What the pages name exists: links, files, commands and their flags, make's targets, Python names."""

import ast
import importlib.util
import inspect
import pkgutil
import re
import runpy
import shlex
import tomllib
from functools import cache
from pathlib import Path

import pytest
import typer

import redepth
from redepth.cli import app
from redepth.data.tasks.specs import TASK_GROUP
from redepth.modeling.exits import EXIT_TEST_GROUP

ROOT = Path(__file__).parent.parent
PACKAGE = Path(redepth.__file__).parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands
FLAGS = {
    name: {"--help"} | {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    for name, command in COMMANDS.items()
}
SCRIPTS = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "examples").glob("*.py")]
FOLDERS = {folder.name for root in (ROOT, PACKAGE) for folder in root.iterdir() if folder.is_dir()} - {
    ".venv",
    "build",
    "demo",
    "runs",
}  # made here, not ours
SUFFIXES = (".py", ".md", ".yaml", ".json")  # .txt, .jsonl and .parquet are a reader's own data
OTHERS_FLAGS = {"--model_args", "--no-deps"}  # of lm-eval and pip

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_of(page: Path) -> tuple[list[str], list[str]]:
    """A page's lines of shell, continued ones joined, and its code spans."""
    text = page.read_text(encoding="utf-8")
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    shell = [line for kind, block in fences if kind == "sh" for line in block.replace("\\\n", " ").splitlines()]
    prose = re.sub(r"^```.*?^```|^<!-- made by .*?^<!-- end", "", text, flags=re.MULTILINE | re.DOTALL)
    return shell, [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def names_known() -> str:
    """The name of every file of the project, and the package's source, which names what it reads and writes."""
    roots = [ROOT / part for part in ("benchmarks", "docs", "examples", "recipes", "src", "tests")]
    files = [file for root in roots for file in root.rglob("*") if file.suffix in SUFFIXES]
    return "\n".join([file.name for file in files] + [file.read_text("utf-8") for file in PACKAGE.rglob("*.py")])


def missing_file(word: str, in_shell: bool) -> bool:
    """Whether a word names a file of this project that is not there."""
    name = word.strip("(),;:").removeprefix("./")
    first, slash, _ = name.partition("/")
    if any(part.partition(".")[0].isupper() for part in name.split("/")) and not (ROOT / first).is_file():
        return False  # stands for a reader's own: OUT/recipe.yaml, RECIPE.yaml
    if name.startswith("my."):
        return False
    if re.search(r"[*{<:=…$]", name):
        return False
    if slash:
        ours = (first in FOLDERS and not name.endswith(".json")) or name.endswith(".py")  # healing/ is OUT/healing too
        return ours and not any((root / name).exists() for root in (ROOT, PACKAGE))
    # In shell a bare name that is no program is the reader's own.
    named = name.endswith(".py" if in_shell else SUFFIXES)
    return named and not (ROOT / name).exists() and name not in names_known()


def unknown_flags(line: str) -> list[str]:
    """The commands, flags, scripts' flags and make targets of one line of shell that do not exist."""
    wrong: list[str] = []
    known: set[str] | None = None
    words = shlex.split(line.replace("'", "\\'"), comments=True)
    for number, word in enumerate(words):
        follows = words[number + 1] if number + 1 < len(words) else ""
        if word in ("&&", "|", ";"):
            known = None
        elif word == "redepth" and (
            number == 0 or words[number - 1] in ("-m", "&&", "&", ";") or "=" in words[number - 1]
        ):
            if follows in FLAGS or follows.isupper() or follows.startswith("-"):
                known = FLAGS.get(follows) or set().union(*FLAGS.values())
            else:
                wrong.append(f"redepth {follows}")
        elif word.endswith(".py") and (ROOT / word).exists():
            source = (ROOT / word).read_text(encoding="utf-8")
            # The benchmarks of speed share a parser.
            shared = ROOT / "benchmarks" / "turns.py"
            source += shared.read_text(encoding="utf-8") if "parser_of" in source else ""
            known = set(re.findall(r"[\"'](--[\w-]+)[\"']", source))
        elif (
            word == "make" and follows and not re.search(rf"^{follows}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        ):
            wrong.append(f"make {follows}")
        elif known is not None and re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known:
            wrong.append(word)
    return wrong


@pages
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"^(<<<<<<<|>>>>>>>) ", text, flags=re.MULTILINE), f"{page.name} holds both sides of a merge"
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}, which has no such heading"


@pages
def test_files_exist(page: Path) -> None:
    shell, spans = code_of(page)
    words = [(word, True) for line in shell for word in line.split()] + [
        (word, False) for s in spans for word in s.split()
    ]
    missing = sorted({word for word, in_shell in words if missing_file(word, in_shell)})
    assert not missing, f"{page.name} names files that do not exist: {', '.join(missing)}"


@pages
def test_commands_and_flags_exist(page: Path) -> None:
    shell, spans = code_of(page)
    commands = ("redepth ", "make ", "python ")
    wrong = [flag for line in shell + [s for s in spans if s.startswith(commands)] for flag in unknown_flags(line)]
    ours = set().union(*FLAGS.values()) | OTHERS_FLAGS
    ours |= {flag for file in SCRIPTS for flag in re.findall(r"[\"'](--[\w-]+)[\"']", file.read_text(encoding="utf-8"))}
    for span in spans:
        if not span.startswith(commands):
            wrong += [
                word for word in span.split() if re.match(r"--[a-z]", word) and word.partition("=")[0] not in ours
            ]
    assert not wrong, f"{page.name} names commands or flags that do not exist: {', '.join(wrong)}"


@pages
def test_extras_exist(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for named in re.findall(r"\bredepth\[([\w,]+)\]", page.read_text(encoding="utf-8")):
        assert set(named.split(",")) <= set(extras), f"{page.name} names redepth[{named}], which is no extra"


@pages
def test_python_names_exist(page: Path) -> None:
    named = set(re.findall(r"(?<![\w./-])redepth(?:\.[A-Za-z_]\w*)+", page.read_text(encoding="utf-8")))
    for name in named - {EXIT_TEST_GROUP, TASK_GROUP}:
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            if not is_module(name):
                pytest.fail(f"{page.name} names {name}, which does not exist")


def is_module(name: str) -> bool:
    """Whether there is such a module, even where what it imports is an extra that is not installed."""
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


@pages
def test_python_calls_have_their_arguments(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL):
        for call in (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            if name.startswith("redepth."):
                given = {keyword.arg: None for keyword in call.keywords if keyword.arg}
                inspect.signature(pkgutil.resolve_name(name)).bind_partial(*call.args, **given)


def test_the_tree_of_files_is_as_it_is() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "tree.py"))
    page = script["PAGE"].read_text(encoding="utf-8")
    assert script["written"](page) == script["tree"](), "files or their first lines have changed; run make tree"


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("redepth convert A B --core 12:18 --untie", []),
        ("redepth convert A B --cores 12:18", ["--cores"]),
        ("redepth covert A B", ["redepth covert"]),
        ("make no-such-target", ["make no-such-target"]),
        ("python examples/train_griffin.py --save ./griffin --no-such-flag", ["--no-such-flag"]),
        ("torchrun --nproc-per-node 2 -m redepth heal OUT --recipes R.yaml  # note", ["--recipes"]),
    ],
)
def test_the_check_finds_what_is_wrong(line: str, wrong: list[str]) -> None:
    assert unknown_flags(line) == wrong


@pytest.mark.parametrize(
    ("word", "missing"),
    [("recipes/demo.yaml", False), ("recipes/no.yaml", True), ("modeling/kinds.py", True), ("OUT/recipe.yaml", False),
     ("no_such_file.py", True), ("config.json", False), ("google/recurrentgemma-2b", False)],
)  # fmt: skip
def test_the_check_finds_what_is_missing(word: str, missing: bool) -> None:
    assert missing_file(word, in_shell=False) == missing

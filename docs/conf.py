"""The docs site (`make docs`): the pages of this folder, and references made from the code while it is built."""

import inspect
import re
import subprocess
import sys

import redepth

project = "redepth"
html_title = "redepth"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3  # the anchors that GitHub gives to headings
smartquotes = False  # a flag keeps its two hyphens
autodoc_inherit_docstrings = False  # those of transformers are written for its own site
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80


def command_reference() -> str:
    """Every command of `redepth.cli.app` with its arguments and flags, as typer tells them."""
    call = [sys.executable, "-m", "typer", "redepth.cli", "utils", "docs", "--name", "redepth"]
    text = subprocess.run(call, check=True, capture_output=True, encoding="utf-8").stdout
    _, _, commands = text.partition("\n## ")
    return "## " + re.sub(r"^Example: (.+)$", r"```sh\n\1\n```", commands, flags=re.MULTILINE)


def python_reference() -> str:
    """What `import redepth` gives, from its docstrings: functions, then classes."""
    public = {name: getattr(redepth, name) for name in redepth.__all__}
    parts = []
    for heading, wanted, directive in (
        ("Functions", inspect.isroutine, "autofunction"),
        ("Classes", inspect.isclass, "autoclass"),
    ):
        parts.append(f"## {heading}\n")
        for name in sorted((name for name, value in public.items() if wanted(value)), key=str.lower):
            members = "   :members:\n   :show-inheritance:\n" if directive == "autoclass" else ""
            parts.append(f"### {name}\n```{{eval-rst}}\n.. {directive}:: redepth.{name}\n{members}```\n")
            fields = getattr(public[name], "model_fields", {})
            if fields:
                parts.append("| key | default | means |\n| --- | --- | --- |")
                parts += [f"| `{key}` | `{field.default}` | {field.description} |" for key, field in fields.items()]
                parts.append("")
    return "\n".join(parts)


REFERENCES = {"commands": command_reference, "api": python_reference}


def add_reference(app, page: str, source: list[str]) -> None:
    if page in REFERENCES:
        source[0] += "\n" + REFERENCES[page]()


def markdown_to_rst(app, what, name, object_, options, lines: list[str]) -> None:
    """Docstrings have Markdown's code marks; what reStructuredText would take for markup outside them is escaped."""
    made: list[str] = []
    example = False
    for line in lines:
        if line == "Example:":
            example = True
            made += ["Example::", ""]
        elif example and (not line or line.startswith(" ")):
            made.append(line)
        else:
            example = False
            spans = re.split(r"(``?[^`]+`?`)", line)
            spans[::2] = [re.sub(r"([*|\\]|_(?!\w))", r"\\\1", text) for text in spans[::2]]
            spans[1::2] = [f"``{code.strip('`')}``" for code in spans[1::2]]
            made.append("".join(spans))
    lines[:] = made


def setup(app) -> None:
    app.connect("source-read", add_reference)
    app.connect("autodoc-process-docstring", markdown_to_rst, priority=100)  # before napoleon

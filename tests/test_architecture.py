"""Arrows point one way: cli → api → verbs → checkpoint, data, modeling → runtime; and the start is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import redepth
import redepth.modeling

PACKAGE = Path(redepth.__file__).parent
MODELING_MAY_IMPORT = {
    "torch",
    "transformers",
    "safetensors",
    "difflib",
    "json",
    "collections",
    "contextlib",
    "copy",
    "dataclasses",
    "functools",
    "ctypes",
    "hashlib",
    "importlib",
    "inspect",
    "math",
    "operator",
    "os",
    "pathlib",
    "pkgutil",
    "platform",
    "re",
    "subprocess",
    "tempfile",
    "time",
    "typing",
    "warnings",
    "weakref",
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
    """All but the package's own `__init__`, which does not travel."""
    for file in set((PACKAGE / "modeling").glob("*.py")) - {PACKAGE / "modeling" / "__init__.py"}:
        for module, level in imports_of(file):
            assert level == 1 or module.split(".")[0] in MODELING_MAY_IMPORT, f"{file.name} imports {module}"
            assert level != 1 or "." not in module, f"{file.name} imports {module}; exported files lie flat"


# Packages may import what stands before them; api.py opens the door to all, and cli knows the door alone.
ORDER: dict[str, int] = {
    "errors": 0,
    "runtime": 1,
    "modeling": 1,
    "registration": 2,
    "griffin": 2,
    "data": 2,
    "checkpoint": 3,
    "evaluation": 4,
    "surgery": 4,
    "analysis": 5,
    "healing": 5,
    "serving": 5,
    "playground": 6,
    "api": 7,
    "cli": 8,
}
MOST_LINES = 400


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def parts_imported(file: Path) -> set[str]:
    """The other parts of redepth that a file imports, now or later; what is there for type checkers alone left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = ("redepth", *file.relative_to(PACKAGE).parts[:-1])
            stem = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (stem, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "redepth" else [module]
        found |= {name.split(".")[1] for name in names if name.startswith("redepth.")}
    return (found - {part_of(file)}) & ORDER.keys()


def test_arrows_point_one_way() -> None:
    for file in PACKAGE.rglob("*.py"):
        part = part_of(file)
        if part not in ("__init__", "__main__"):
            for other in parts_imported(file):
                assert ORDER[other] < ORDER[part], f"{file.relative_to(PACKAGE)} imports {other}"


def test_the_command_line_knows_the_door_alone() -> None:
    for file in (PACKAGE / "cli").glob("*.py"):
        assert parts_imported(file) <= {"api", "errors"}, file.name


def test_files_stay_short() -> None:
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in PACKAGE.rglob("*.py")}
    assert {file.name: length for file, length in lengths.items() if length > MOST_LINES} == {}


def test_no_verb_is_hidden_by_a_part_of_its_name() -> None:
    """Importing a part makes it an attribute of the package, in the place of a function that is called the same."""
    assert not set(redepth.__all__) & {file.stem for file in PACKAGE.iterdir()}


# Other libraries' names that have no public twin; each was looked for.
FOREIGN_PRIVATE = {
    "_attn_implementation",  # transformers: of a config
    "_modules",  # of a torch module
    "_parameters",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_cdata",  # torch: which storage this is
    "_is_amx_tile_supported",  # torch.cpu
    "_is_avx512_bf16_supported",
    "_linear_pointwise",  # torch.ops.mkldnn
    "_reorder_linear_weight",
    "_version",  # of a tensor: how often it was changed in place
    "_is_vnni_supported",
    "_convert_weight_to_int4pack_for_cpu",  # torch's kernels for quantised weights
    "_make_per_channel_quantized_tensor",
    "_weight_int4pack_mm_for_cpu",
    "_weight_int8pack_mm",
    "_pad_token_tensor",  # transformers: of a prepared generation config
    "_replace",  # of every named tuple, public in spite of its name
}


def private_reads(file: Path) -> set[str]:
    """Underscore names that a file reads of something that it does not define itself."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    own: set[str] = set()
    read: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and (
            isinstance(node.ctx, ast.Store) or (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
        ):
            own.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute):
            read.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            read |= {alias.name for alias in node.names}
    return {name for name in read - own if name.startswith("_") and not name.startswith("__")}


def test_nobody_reads_what_is_private_to_others() -> None:
    found = {
        file.relative_to(PACKAGE).as_posix(): private_reads(file) - FOREIGN_PRIVATE for file in PACKAGE.rglob("*.py")
    }
    assert {file: names for file, names in found.items() if names} == {}


def test_the_start_is_cheap() -> None:
    """The package, its door and the command line import neither torch nor transformers, which take seconds."""
    script = (
        "import sys, redepth, redepth.api, redepth.cli; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_command_line_imports_the_command_that_it_names() -> None:
    script = (
        "import sys; from redepth.cli import main\n"
        "sys.argv[1:] = ['inspect', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(*(name for name in sys.modules if name.startswith(('redepth.cli.', 'torch', 'transformers'))))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["redepth.cli.console", "redepth.cli.inspect"]


def test_plain_modelling_files_need_no_torch() -> None:
    """What a checkpoint can be looked at with; they import each other alone."""
    for name in redepth.modeling.PLAIN:
        for module, level in imports_of(PACKAGE / "modeling" / f"{name}.py"):
            outside = module.split(".")[0]
            assert (
                module in redepth.modeling.PLAIN if level else outside not in ("torch", "transformers", "safetensors")
            )


REGISTERED = """
import sys
exec(sys.argv[1])
from transformers import AutoConfig, AutoModelForCausalLM
import redepth
config = AutoConfig.for_model("huginn_raven", n_embd=8, n_heads=1, intermediate_size=8, vocab_size=8)
assert type(config) is redepth.RecurrentDepthConfig
assert isinstance(AutoModelForCausalLM.from_config(config), redepth.RecurrentDepthForCausalLM)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import redepth",
        "from transformers import AutoConfig",
        "import redepth; from transformers import AutoConfig",
        pytest.param("import redepth; from transformers import AutoModelForCausalLM", marks=pytest.mark.slow),
        pytest.param("from transformers import AutoModelForCausalLM; import redepth.griffin", marks=pytest.mark.slow),
        pytest.param("import redepth.modeling.fields; import redepth.modeling.configuration", marks=pytest.mark.slow),
        pytest.param("import redepth.modeling.cache", marks=pytest.mark.slow),
        pytest.param("import redepth.modeling.blocks", marks=pytest.mark.slow),
    ],
)
def test_transformers_learns_of_the_format_whatever_is_imported_first(first: str) -> None:
    done = subprocess.run([sys.executable, "-c", REGISTERED, first], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]

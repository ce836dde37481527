"""pytest plugin: transformers' own tests, from a checkout that the user names, as the package `transformers_tests`.

The folder in a checkout is called `tests`, as redepth's is, so it is imported under another name.
"""

import os
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers

from tests.peer.by_design import reason_for

PACKAGE = "transformers_tests"
VARIABLE = "TRANSFORMERS"
HOW = f"make test-peer {VARIABLE}=DIR"
# The mixins, and the file of each.
MODEL_TESTS = "test_modeling_common"
GENERATION_TESTS = "generation.test_utils"


def pytest_configure() -> None:
    """Make the checkout's tests importable.

    Raises:
        pytest.UsageError: where the variable is not set or the folder is no checkout.
    """
    named = os.environ.get(VARIABLE, "")
    if not named:
        raise pytest.UsageError(f"{VARIABLE} is not set; give a checkout of transformers: {HOW}")
    tests = Path(named).expanduser().resolve() / "tests"
    for module in (MODEL_TESTS, GENERATION_TESTS):
        path = tests / (module.replace(".", "/") + ".py")
        if not path.is_file():
            raise pytest.UsageError(
                f"{VARIABLE}={named} is no checkout of transformers: {path} is missing; give the folder of a git checkout "
                f"of v{transformers.__version__}, since a release on PyPI leaves files out: {HOW}"
            )
    package = ModuleType(PACKAGE)
    package.__path__ = [str(tests)]
    sys.modules[PACKAGE] = package


def mixin(module: str, name: str) -> Any:
    """One of the suite's classes.

    Raises:
        pytest.UsageError: where the checkout's tests need what is not installed, such as another version.
    """
    try:
        return getattr(import_module(f"{PACKAGE}.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise pytest.UsageError(
            f"{VARIABLE}={os.environ[VARIABLE]}: its tests can't be imported beside transformers "
            f"{transformers.__version__} ({error}); check out v{transformers.__version__}"
        ) from error


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `by_design` lists: such a test must fail, so that a row which no longer holds is noticed."""
    for item in items:
        reason = reason_for(item.cls.__name__, item.name) if isinstance(item, pytest.Function) and item.cls else None
        if reason is not None:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))

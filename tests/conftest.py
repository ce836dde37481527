"""Offline and seeded; the tiny sources that all tests share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Several workers share the cores; tiny models gain nothing from a second thread.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch

from tests.zoo import FAMILIES, save_source

# The longest by far; begun last, one of them would keep a single worker busy while the other has nothing left.
FIRST = ("test_real", "test_healing_resume", "test_surgery", "test_retrofit", "test_bad_input", "test_recurrent_gemma")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in FIRST)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with a tiny random transformers checkpoint for every family, by name."""
    root = tmp_path_factory.mktemp("zoo")
    return {name: save_source(name, root / name) for name in FAMILIES}


@pytest.fixture(params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def source(family: str, zoo: dict[str, Path]) -> Path:
    return zoo[family]

"""Shared fixtures."""

import os
from pathlib import Path

import pytest

from verl_m2po.tasks import arithmetic, tiny_model

# For the processes that tests start: what is no part of the package, as `make bench` and `make study` have it.
REPOSITORY = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [
        str(REPOSITORY / "tests"),
        str(REPOSITORY / "recipes"),
        str(REPOSITORY / "docs"),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several workers: end-to-end runs first and one by one, all other tests of a file on one of them."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)
    for item in items:
        if item.get_closest_marker("e2e") is None:
            item.add_marker(pytest.mark.xdist_group(str(item.path)))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base model, from the user's cache if it is there."""
    return tiny_model.build()


@pytest.fixture(scope="session")
def addition(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.parquet and validation.parquet of two-digit addition."""
    folder = tmp_path_factory.mktemp("addition")
    arithmetic.write_parquet(folder, train_rows=512, validation_rows=32)
    return folder

"""Shared fixtures."""

import os
from pathlib import Path
from typing import Any

import pytest
from parsed_once import parse_once

from verl_m2po.tasks import arithmetic, tiny_model

# For the processes that tests start: what is no part of the package, as `make bench` and `make study` have it.
REPOSITORY = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(
    [
        str(REPOSITORY / "tests"),
        str(REPOSITORY / "tests" / "support"),
        str(REPOSITORY / "recipes"),
        str(REPOSITORY / "docs"),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
)


parse_once()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End-to-end runs first: they are the longest, and with several workers the short tests fill the gaps."""
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers: end-to-end runs one by one, all other tests of a file on one of them.

    By the file and not by the mark ``xdist_group``: xdist 3.8 loses the groups under pytest 9.2, and every worker
    then builds the fixtures of every file.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if "e2e" in Path(file).parts else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


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

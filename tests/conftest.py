"""Shared fixtures."""

from pathlib import Path

import pytest

from verl_m2po.tasks import arithmetic, tiny_model


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

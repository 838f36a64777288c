"""Whether this process runs verl without a GPU. Imports nothing, so that every other module may ask."""

import os

PLATFORM_VARIABLE = "VERL_PLATFORM"
PLATFORM_NAME = "cpu"


def is_selected() -> bool:
    """Return whether verl was told to use the CPU platform (``VERL_PLATFORM=cpu``) in this process."""
    return os.environ.get(PLATFORM_VARIABLE, "").strip().lower() == PLATFORM_NAME


def select() -> None:
    """Choose the CPU platform for this process and for those that inherit its environment."""
    os.environ[PLATFORM_VARIABLE] = PLATFORM_NAME

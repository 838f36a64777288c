"""Composing reads every file of verl's config tree again and again; parsing them once halves what tests spend on it."""

import copy
import os
from typing import Any

from omegaconf import OmegaConf


def parse_once() -> None:
    """Let `OmegaConf.load` parse a file that it opened only once, as long as that is as it was."""
    load, parsed = OmegaConf.load, {}

    def load_once(file: Any) -> Any:
        if not hasattr(file, "fileno"):
            return load(file)
        now = os.fstat(file.fileno())
        version = (file.name, now.st_ino, now.st_size, now.st_mtime_ns)
        if version not in parsed:
            parsed[version] = load(file)
        return copy.deepcopy(parsed[version])

    OmegaConf.load = staticmethod(load_once)

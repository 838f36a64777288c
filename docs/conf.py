"""Sphinx configuration: `make docs`."""

import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


class _Stub(types.ModuleType):
    """A module all of whose attributes are empty classes, so that annotations such as ``Tensor | None`` work."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__module__": self.__name__})


# The documented modules need torch and numpy for their names only; a docs build shall not install them.
torch = sys.modules["torch"] = _Stub("torch")
torch.distributed = sys.modules["torch.distributed"] = _Stub("torch.distributed")
sys.modules["numpy"] = _Stub("numpy")

project = "verl-m2po"
author = "The verl-m2po authors"
copyright = author

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
# Pages may be reached by a link instead; tests/test_docs.py finds those that are not reached at all.
suppress_warnings = ["toc.not_included"]
html_theme = "furo"
html_title = project

myst_enable_extensions = ["dollarmath"]
# Links such as page.md#heading are checked against these.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Single backticks in docstrings are code.
default_role = "code"

linkcheck_timeout = 20
linkcheck_retries = 2


def _keep_bars(_app, _what, _name, _object, _options, lines: list[str]) -> None:
    """In docstrings |log r| is an absolute value, not a reStructuredText substitution."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def setup(app) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", _keep_bars)

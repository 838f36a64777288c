"""One HTML page that needs nothing else: figures are in it as data, names are escaped, nothing is loaded or run."""

import base64
from importlib import resources

from jinja2 import Environment, StrictUndefined

TEMPLATE = "page.html.j2"


def _environment() -> Environment:
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    return environment


def page(
    rows: list[dict[str, str]],
    about: list[dict[str, str]],
    figures: list[tuple[str, str, bytes]],
    problems: list[str],
    refresh_s: float | None = None,
) -> str:
    """The page.

    Args:
        rows: Column title to text, as from `tables.rows`.
        about: Likewise, what the runs were, as from `about.about`.
        figures: Title, caption and SVG of each figure.
        problems: One line for each thing that is missing.
        refresh_s: Seconds after which a browser reloads the page; None for never.
    """
    template = resources.files("verl_m2po.report.drawing").joinpath(TEMPLATE).read_text(encoding="utf-8")
    return (
        _environment()
        .from_string(template)
        .render(rows=rows, about=about, figures=figures, problems=problems, refresh_s=refresh_s)
    )

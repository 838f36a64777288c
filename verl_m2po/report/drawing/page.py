"""One HTML page that needs nothing else: figures are in it as data, names are escaped, nothing is loaded or run."""

import base64
from html import escape

# The page may show pictures and style that are in it, and load or run nothing at all.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
.wide { overflow-x: auto; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2.5rem 0; } figcaption { color: #555; } img { max-width: 100%; height: auto; }
.problems { background: #fdf6e3; border-left: 4px solid #e69f00; padding: .5rem 1rem; overflow-wrap: anywhere; }
"""


def _table(rows: list[dict[str, str]]) -> str:
    if not rows:
        return "<p>No run logged a result yet.</p>"
    head = "".join(f"<th>{escape(title)}</th>" for title in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(title: str, caption: str, svg: bytes) -> str:
    data = base64.b64encode(svg).decode("ascii")
    return (
        f'<figure><h2>{escape(title)}</h2><img alt="{escape(title)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def page(
    rows: list[dict[str, str]],
    figures: list[tuple[str, str, bytes]],
    problems: list[str],
    refresh_s: float | None = None,
) -> str:
    """The page.

    Args:
        rows: Column title to text, as from `tables.rows`.
        figures: Title, caption and SVG of each figure.
        problems: One line for each thing that is missing.
        refresh_s: Seconds after which a browser reloads the page; None for never.
    """
    refresh = f'<meta http-equiv="refresh" content="{max(1, round(refresh_s))}">' if refresh_s is not None else ""
    listed = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    missing = f'<section class="problems"><h2>Not there</h2><ul>{listed}</ul></section>' if problems else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>verl-m2po report</title>{refresh}'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head><body>'
        f"<h1>Runs</h1>{_table(rows)}<p>Mean ± standard deviation over seeds.</p>{missing}"
        + "".join(_figure(*figure) for figure in figures)
        + "</body></html>\n"
    )

"""Writes the tables of README.md and docs/ that repeat what the code knows: python docs/generate_tables.py.

Each stands between two markers on its page; tests/test_docs.py compares them.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

from generate_configuration import CONFIG, title
from generate_matrix import features
from pages import replace_section

DOCS = Path(__file__).parent
CHAINS = DOCS / "results" / "chains.json"
REPOSITORY = DOCS.parent


def extensions() -> Iterator[str]:
    """Yield what the plugin registers with verl, from the plugin's table."""
    from verl_m2po.plugin import EXTENSIONS

    yield from ("| what | after the import of | our module | names |", "| --- | --- | --- | --- |")
    for row in EXTENSIONS:
        names = ", ".join(f"`{name}`" for name in row.names)
        yield f"| {row.what} | `{row.host}` | `{row.module}` | {names} |"


def patches() -> Iterator[str]:
    """Yield what is changed in verl, vLLM and Ray, from the records of the patches."""
    from verl_m2po.patches import PATCHES

    yield from ("| changed | in | symptom without it | cause | goes when |", "| --- | --- | --- | --- | --- |")
    for patch in PATCHES:
        said = [_code(text).removesuffix(".") for text in (patch.symptom, patch.cause, patch.end)]
        yield f"| `{patch.replaces}` | {patch.scope.value} | {' | '.join(said)} |"


def extension_points() -> Iterator[str]:
    """Yield what of verl this package holds on to."""
    from verl_m2po.cli.extension_points import POINTS

    yield from ("| of verl | takes | here for | run by |", "| --- | --- | --- | --- |")
    for point in POINTS:
        yield f"| `{point.name}` | `{point.parameters}` | {point.use} | `{point.test}` |"


def _code(text: str) -> str:
    """reStructuredText's code as Markdown's, and no end of a cell inside it."""
    return text.replace("``", "`").replace("|", "\\|")


def losses() -> Iterator[str]:
    """Yield every option of the group `loss` with its plot and the first sentence of its file, ours first."""
    yield from ("| `loss=` | a token | |", "| --- | --- | --- |")
    for name in sorted(_presets(), key=_ours_first):
        text = title((CONFIG / "loss" / f"{name}.yaml").read_text())
        first_sentence = " ".join(text.split()).partition(". ")[0].removesuffix(".")
        yield f"| `{name}` | ![{name}](docs/figures/methods/{name}.svg) | {first_sentence} |"


def count_of_losses() -> Iterator[str]:
    """Yield the heading above that table."""
    yield f"<summary>The {len(_presets())} options of <code>loss=</code></summary>"


def _presets() -> list[str]:
    return [file.stem for file in (CONFIG / "loss").glob("*.yaml")]


def _ours_first(name: str) -> tuple[bool, bool, str]:
    ours = {preset for loss in _records() for preset in loss.presets}
    return name not in ours, name != "m2po", name


def registered_losses() -> Iterator[str]:
    """Yield every loss of this package, from its record."""
    yield from ("| `algorithm.policy_loss=` | what it does | options of `loss=` |", "| --- | --- | --- |")
    for loss in _records():
        options = ", ".join(f"`{preset}`" for preset in loss.presets)
        yield f"| `{loss.name}` | {_code(loss.summary)} | {options} |"


def _records() -> list:
    import verl_m2po.losses  # noqa: F401  (fills LOSSES)
    from verl_m2po.losses.kernel.registry import LOSSES

    return sorted(LOSSES.values(), key=lambda loss: (loss.name != "m2po", loss.name))


def chains() -> Iterator[str]:
    """Yield what processes were killed in runs that went on, by mode, from what `make faults` wrote."""
    yield "| mode | killed | times | servers lost | groups moved | generation lost | trainer waited, mean (longest) |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    found = defaultdict(list)
    for record in json.loads(CHAINS.read_text()):
        strike = record["strike"]
        alone = strike["pattern"] == "one"
        found[record["mode"], strike["targets"][0] if alone else strike["pattern"]].append(strike)
    for (mode, struck), strikes in sorted(found.items()):
        lost, moved, generation = (
            sum(strike[name] for strike in strikes) for name in ("replicas_lost", "groups_moved", "lost_generation_s")
        )
        waited = [strike["trainer_waited_s"] for strike in strikes]
        times = f"{fmean(waited):.0f} s ({max(waited):.0f} s)"
        yield f"| `{mode}` | {struck} | {len(strikes)} | {lost:.0f} | {moved:.0f} | {generation:.0f} s | {times} |"


SECTIONS: dict[tuple[str, str], Callable[[], Iterator[str]]] = {
    ("README.md", "number of losses"): count_of_losses,
    ("README.md", "losses"): losses,
    ("docs/methods.md", "registered losses"): registered_losses,
    ("docs/plugin.md", "extensions"): extensions,
    ("docs/compatibility.md", "features"): features,
    ("docs/plugin.md", "patches"): patches,
    ("docs/reliability.md", "chains of kills"): chains,
    ("docs/plugin.md", "extension points"): extension_points,
}


if __name__ == "__main__":
    for (page, name), lines in SECTIONS.items():
        replace_section(REPOSITORY / page, name, "\n".join(lines()))

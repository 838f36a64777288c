"""Writes the tables of docs/compatibility.md on verl's scripts and entry points: python docs/generate_compatibility.py.

Composes what 86 scripts pass (a minute on two idle cores). tests/config/test_verl_examples.py
compares; the scripts are data, tests/config/verl_example_overrides.yaml.
"""

import importlib.util
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import NamedTuple
from unittest import mock

from pages import replace_section

PAGE = Path(__file__).with_name("compatibility.md")
README = PAGE.parents[1] / "README.md"

RUNS = "runs (tests/e2e)"
COMPOSES = "composes"


class EntryPoint(NamedTuple):
    """A program that trains.

    Args:
        name: on the page.
        module: that holds its main.
        proof: what a test did with it; empty where it is refused.
        source: of the main, where it is not in verl's wheel.
        override: one more, beside those of M2PO at staleness 256.
    """

    name: str
    module: str
    proof: str = ""
    source: str = ""
    override: str = ""


VERLS = "verl.trainer.main_ppo"
EXPERIMENTAL = ("one_step_off_policy.main_ppo", "fully_async_policy.fully_async_main")
V1 = "TaskRunnerV1"
OWN_MAIN = "def main(config):\n    run_ppo(config, {runner})\n"
ENTRY_POINTS = (
    EntryPoint(f"`python -m {VERLS}`", VERLS, RUNS),
    EntryPoint("the same with `trainer.use_v1=false`", VERLS, override="trainer.use_v1=false"),
    EntryPoint(
        "a main that starts verl's `TaskRunnerV1`", "mine.main", COMPOSES, OWN_MAIN.format(runner="TaskRunnerV1")
    ),
    *(EntryPoint(f"`python -m verl.experimental.{name}`", f"verl.experimental.{name}") for name in EXPERIMENTAL),
    EntryPoint(
        "`python -m recipe.dapo.main_dapo`, and any main with a trainer of its own",
        "recipe.dapo.main_dapo",
        source=OWN_MAIN.format(runner="TaskRunner"),
    ),
)


def entry_points(directory: Path) -> Iterator[str]:
    """Yield what each entry point does with M2PO at staleness 256, by the check that a run goes through.

    Args:
        directory: for the sources of mains that are not installed.
    """
    yield from ("| entry point | with M2PO at staleness 256 |", "| --- | --- |")
    for entry in ENTRY_POINTS:
        refused = _refused(entry, directory)
        yield f"| {entry.name} | {'refused: ' + ' '.join(refused) if refused else entry.proof} |"


def _refused(entry: EntryPoint, directory: Path) -> list[str]:
    from composing import composed
    from verl_examples import M2PO_AT_256

    from verl_m2po.launch.checks import entry_point
    from verl_m2po.staleness.checks import setup

    settings = [f"{key}={value}" for key, value in M2PO_AT_256.items()]
    config = composed("ppo_trainer", *settings, *filter(None, [entry.override]))
    with mock.patch.dict(sys.modules):
        found = [*entry_point.problems(config, _main(entry.module, entry.source, directory)), *setup.replaced(config)]
    return [str(problem) for problem in found if problem.is_fatal]


def _main(module: str, source: str, directory: Path) -> FunctionType:
    """A main that stands in `module`, which is not run: its trainer is known by its source."""
    if source:
        path = directory / f"{len(list(directory.iterdir()))}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(module, path)
    else:
        spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    made = ModuleType(module)
    made.__spec__, made.__file__ = spec, spec.origin
    sys.modules[module] = made
    main = FunctionType((lambda config: None).__code__, vars(made))
    main.__module__ = module
    return main


def main() -> None:
    """Compose, and write both tables and the numbers on both pages."""
    from verl_examples import composed_at_256, counts, rows

    with tempfile.TemporaryDirectory() as directory:
        replace_section(PAGE, "entry points", "\n".join(entry_points(Path(directory))))
        table = list(rows(composed_at_256(Path(directory))))
    replace_section(PAGE, "verl's scripts", "\n".join(table))
    for page in (PAGE, README):
        replace_section(page, "verl's scripts in numbers", wrapped(counts(table)))


def wrapped(text: str) -> str:
    """`text` in lines as they stand on the pages."""
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    main()

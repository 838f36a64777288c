"""What the imports of each process of a run cost: `python -m benchmarks.startup`, into docs/benchmarks.md with --out.

In CPU seconds of that process, which a busy machine distorts less than the clock.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from pages import processor, replace_section

PROCESSES = {
    "driver": ("verl.trainer.main_ppo",),
    "trainer": ("verl.trainer.main_ppo", "verl.trainer.ppo.v1"),
    "actor worker": ("verl.workers.engine_workers", "verl.workers.rollout.vllm_rollout.vllm_rollout"),
    "rollout server": ("verl.workers.rollout.vllm_rollout.vllm_async_server",),
    "agent loop worker": ("verl.trainer.ppo.v1.agent_loop_tq",),
}
_MEASURE = (
    "import importlib, time; start = time.process_time(); [importlib.import_module(name) for name in {modules!r}]; "
    "print(time.process_time() - start)"
)


def seconds(modules: tuple[str, ...]) -> float:
    """CPU seconds that a process needs to import `modules`."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE.format(modules=modules)],
        env={**os.environ, "VERL_PLATFORM": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def table() -> str:
    """The table, in Markdown."""
    rows = [f"| {name} | {seconds(modules):.1f} |" for name, modules in PROCESSES.items()]
    return "\n".join([f"{processor()}.", "", "| process | imports, CPU s |", "| --- | --- |", *rows])


def main() -> None:
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="the page; without it, the table is printed")
    page = parser.parse_args().out
    if page is None:
        sys.stdout.write(f"{table()}\n")
    else:
        replace_section(page, "start-up", table())


if __name__ == "__main__":
    main()

"""Where the benchmarks' tables go: marked sections of docs/benchmarks.md, and the name of the machine."""

import os
import platform
from pathlib import Path

import typer


def processor() -> str:
    """The processor's name and its number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} cores)"
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def replace_section(path: Path, name: str, table: str) -> None:
    """Replace what stands between the markers of section `name` in the Markdown file `path`."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    text = path.read_text()
    if begin not in text or end not in text:
        raise typer.BadParameter(f"{path} has no section between {begin} and {end}.")
    before, rest = text.split(begin, 1)
    path.write_text(f"{before}{begin}\n{table}\n{end}{rest.split(end, 1)[1]}")

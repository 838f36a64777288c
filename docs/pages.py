"""What generators of docs, benchmarks and the study share: marked sections of a page, and the machine's name."""

import os
import platform
from pathlib import Path


def processor() -> str:
    """The processor's name and its number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} cores)"
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def with_section(text: str, name: str, content: str) -> str:
    """Return the page `text` with `content` between the markers of its section `name`.

    Raises:
        ValueError: The page has no such section.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    if begin not in text or end not in text:
        raise ValueError(f"No section between {begin} and {end}.")
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"


def replace_section(path: Path, name: str, content: str) -> None:
    """Replace what stands between the markers of section `name` in the Markdown file `path`."""
    try:
        path.write_text(with_section(path.read_text(), name, content))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

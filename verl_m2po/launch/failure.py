"""Says once more, as the last thing in the terminal, why a run ended: the error itself stands far above."""

import atexit

from omegaconf import DictConfig
from ray.exceptions import RayTaskError
from rich.console import Console

from verl_m2po.ground.verl_config import read
from verl_m2po.staleness.checks.numbers import SAVE_FREQ
from verl_m2po.staleness.config import is_chosen

_reports: list[str] = []


def say(config: DictConfig, error: BaseException, warnings: list[str], at_once: bool = False) -> None:
    """Print what ended the job of `config` when this process ends, after Hydra's traceback; all jobs in one block.

    Args:
        warnings: what the preflight had to say of it.
        at_once: print it now, since the process goes on.
    """
    if not _reports and not at_once:
        atexit.register(_print)
    _reports.append(report(config, error, warnings))
    if at_once:
        _print()


def report(config: DictConfig, error: BaseException, warnings: list[str]) -> str:
    """The text of one failed job: its error, the warnings before it, how it goes on."""
    lines = [f"  {read(config, 'trainer.experiment_name')} ended with an error:"]
    lines += [f"    {line}" for line in causes(error)]
    lines += [f"  warned of before the start: {warning}" for warning in warnings]
    if is_chosen(config) and SAVE_FREQ.of(config) > 0 and read(config, "trainer.resume_mode") != "disable":
        lines.append("  The same command goes on from the last checkpoint.")
    return "\n".join(lines)


def causes(error: BaseException) -> list[str]:
    """The errors that led to `error`, the first one first, each as one line; one of a Ray process with that process."""
    said: dict[str, None] = {}
    seen: set[int] = set()
    step: BaseException | None = error
    # `raise error from error`, as Ray has it, makes an error its own cause.
    while step is not None and id(step) not in seen:
        seen.add(id(step))
        said.setdefault(_line(step))
        step = step.__cause__ or (None if step.__suppress_context__ else step.__context__)
    return list(reversed(said))


def _line(error: BaseException) -> str:
    if not isinstance(error, RayTaskError):
        return f"{type(error).__name__}: {_first_line(error)}"
    # Its text is the traceback of the other process, headed by what ran there and where.
    place, cause = _first_line(error), error.cause
    return f"{_line(cause)}, in {place}" if isinstance(cause, BaseException) else place


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


def _print() -> None:
    title = "verl-m2po: the run failed" if len(_reports) == 1 else f"verl-m2po: {len(_reports)} runs failed"
    Console(stderr=True, soft_wrap=True, markup=False, highlight=False).print("\n".join([title, *_reports]))
    _reports.clear()

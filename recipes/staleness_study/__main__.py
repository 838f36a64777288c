"""`python -m staleness_study`: run the staleness study, or go on with it, and write docs/results.md."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from staleness_study import comparison_plan, long_plan, plan, prosperity_plan, replay_plan, tried_plan
from staleness_study.plan import REPLAY_CLOCK, VERL, VERL_HOT, WALL_CLOCK, Job
from staleness_study.step_times import StepTimes

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
OUT = Path("outputs/study")
PAGE = Path("docs/results.md")
# Beside the page
DATA = Path("results/study.json")
REPLAY_PAGE, REPLAY_DATA = Path("docs/replay.md"), Path("results/replay.json")
LONG_DATA, PROSPERITY_DATA = Path("results/long.json"), Path("results/prosperity.json")
COMPARISON_DATA, STEP_TIMES = Path("results/comparison.json"), Path("results/step_times.json")
# By the primary config of the task
TRIED_DATA = {plan.ARITHMETIC: Path("results/tried.json"), long_plan.CONFIG: Path("results/tried_long.json")}
REPLAY_CLOCK_DATA = Path(f"results/{REPLAY_CLOCK}.json")
# Of runs through verl, by stage, which is also their folder's name
VERL_DATA = {stage: Path(f"results/{stage}.json") for stage in (VERL, VERL_HOT, WALL_CLOCK)}
Known = Annotated[
    Path | None,
    typer.Option(help="JSON of earlier results: what is in it is left out. The results then take `--keep`."),
]
CORES = os.cpu_count() or 1
Workers = Annotated[int, typer.Option(min=1, help="Runs at a time.")]
Most = Annotated[int | None, typer.Option(min=1, help="Only the first of the queue; all by default.")]
Once = Annotated[
    bool, typer.Option(help="Every condition with one seed, the claim with all of its own. Without it: the rest too.")
]
Keep = Annotated[bool, typer.Option(help="Add to the JSON beside the page, whose runs stay unless they ran anew.")]
Collect = Annotated[bool, typer.Option(help="Read the runs; otherwise write from the JSON beside the page.")]
Folder = Annotated[Path, typer.Option(help="Folder of the runs; finished ones in it are skipped.")]


def _finish(failed: list[str]) -> None:
    """Say what failed, and exit with 1 if anything has."""
    for line in failed:
        typer.echo(line, err=True)
    if failed:
        raise typer.Exit(1)


def _run(jobs: list[Job], out: Path, workers: int, known: Path | None) -> None:
    """Run `jobs`; exits with 1 if any failed."""
    from staleness_study import results as studied
    from staleness_study.run import run_jobs

    _finish(run_jobs(studied.without_known(jobs, known) if known else jobs, out / "one_process", workers, Console()))


def _put(new: dict[str, Any], path: Path, keep: bool) -> None:
    """Write `new`, added to what is in the file where that is to be kept."""
    from staleness_study import results as studied

    studied.write(studied.merge(new, studied.load(path)[0]) if keep and path.exists() else new, path)


def _collect(jobs: list[Job], out: Path, data: Path, keep: bool) -> bool:
    """Put what has run of `jobs` into `data`; whether anything has."""
    from staleness_study.collect import collect_bench
    from staleness_study.run import is_whole

    if has_run := any(is_whole(job, out / "one_process") for job in jobs):
        _put(collect_bench(jobs, out / "one_process"), data, keep)
    return has_run


def _write(jobs: list[Job], out: Path, page: Path, data: Path, keep: bool, write: Callable[..., None]) -> None:
    """Put what has run of `jobs` into `data`, unless there are none, and what `data` has into `page`."""
    from staleness_study import results as studied
    from staleness_study.collect import collect_bench

    if jobs:
        _put(collect_bench(jobs, out / "one_process"), data, keep)
    write(*studied.load(data), page)
    typer.echo(f"written: {page}, {data}")


@app.command()
def run(
    out: Folder = OUT,
    workers: Workers = CORES,
    most: Most = None,
    known: Known = None,
    once: Once = False,
) -> None:
    """All runs on the experiment bench, the most telling ones first. Ctrl-C, and later on from there."""
    jobs = plan.once(plan.jobs(), plan.is_of_the_claim) if once else plan.jobs()
    _run(jobs[:most], out, workers, known)


@app.command()
def replay(
    out: Folder = OUT,
    workers: Workers = CORES,
    most: Most = None,
    known: Known = None,
) -> None:
    """Rollouts that are trained several times, on the bench: methods, uses and windows. Goes on where it stopped."""
    _run(replay_plan.jobs()[:most], out, workers, known)


@app.command()
def long(
    out: Folder = OUT,
    workers: Workers = CORES,
    most: Most = None,
    known: Known = None,
    once: Once = False,
) -> None:
    """The claim and its rivals on column addition, with responses of 60 to 120 tokens. Goes on where it stopped."""
    jobs = plan.once(long_plan.jobs(), long_plan.is_of_the_claim) if once else long_plan.jobs()
    _run(jobs[:most], out, workers, known)


@app.command()
def long_results(
    out: Folder = OUT,
    page: Annotated[Path, typer.Option(help="Its marked section is rewritten.")] = PAGE,
    collect: Collect = True,
    keep: Keep = False,
) -> None:
    """Put what the stage `long` has run so far into its JSON file and docs/results.md."""
    from staleness_study import long_page

    _write(long_plan.jobs() if collect else [], out, page, page.parent / LONG_DATA, keep, long_page.write)


@app.command()
def prosperity(
    out: Folder = OUT,
    workers: Workers = CORES,
    most: Most = None,
    known: Known = None,
    once: Once = False,
) -> None:
    """Column addition at a learning rate at which training without a trust region collapses. Goes on as the others."""
    jobs = plan.once(prosperity_plan.jobs()) if once else prosperity_plan.jobs()
    _run(jobs[:most], out, workers, known)


@app.command()
def prosperity_results(
    out: Folder = OUT,
    page: Annotated[Path, typer.Option(help="Its marked section is rewritten.")] = PAGE,
    collect: Collect = True,
    keep: Keep = False,
) -> None:
    """Put what the stage `prosperity` has run so far into its JSON file and docs/results.md."""
    from staleness_study import prosperity_page

    data = page.parent / PROSPERITY_DATA
    _write(prosperity_plan.jobs() if collect else [], out, page, data, keep, prosperity_page.write)


def _compared(known: Path | None, out: Path) -> list[Any]:
    """What the grid and the comparison have shown so far: results in `known`, and those of the runs under `out`."""
    from staleness_study import results as studied
    from staleness_study.collect import collect_bench
    from staleness_study.run import is_whole

    earlier = studied.load(known)[0] if known else {}
    jobs = [*comparison_plan.grid(), *comparison_plan.jobs({})]
    if any(is_whole(job, out / "one_process") for job in jobs):
        new = collect_bench(jobs, out / "one_process")
        earlier = studied.merge(new, earlier) if earlier else new
    return [studied.Result(**run) for run in earlier.get("runs", ())]


def _comparison(known: list[Any]) -> list[Job]:
    """The grid, and what it and the comparison say to compare by their results `known`."""
    from staleness_study.comparison_page import best_methods
    from staleness_study.rivals import best_settings

    return [*comparison_plan.grid(), *comparison_plan.jobs(best_settings(known), best_methods(known))]


@app.command()
def compare(
    out: Folder = OUT,
    workers: Workers = CORES,
    most: Most = None,
    known: Known = None,
    once: Once = False,
) -> None:
    """M2PO and its rivals on equal data: a small grid of settings first, then five seeds of each and of its best."""

    def queue() -> list[Job]:
        jobs = _comparison(_compared(known, out))
        return (plan.once(jobs) if once else jobs)[:most]

    _run(comparison_plan.grid()[:most], out, workers, known)
    done: list[Job] = []
    # What has run says what else is to run.
    while (jobs := queue()) != done:
        _run(jobs, out, workers, known)
        done = jobs


@app.command()
def compare_results(
    out: Folder = OUT,
    page: Annotated[Path, typer.Option(help="Its marked sections are rewritten.")] = PAGE,
    collect: Collect = True,
    keep: Keep = False,
) -> None:
    """Put what the grid and the comparison have run so far into their JSON file and docs/results.md."""
    from staleness_study import comparison_page

    data = page.parent / COMPARISON_DATA
    earlier = data if keep and data.exists() else None
    jobs = _comparison(_compared(earlier, out)) if collect else []
    _write(jobs, out, page, data, keep, partial(comparison_page.write, times=StepTimes.load(page.parent / STEP_TIMES)))


@app.command()
def step_times(
    steps: Annotated[int, typer.Option(min=1, help="Trainer steps of each method that count.")] = 40,
    page: Annotated[Path, typer.Option(help="The JSON is written beside it.")] = PAGE,
) -> None:
    """What a trainer step costs with each method of the comparison, in turns in one process (about three minutes)."""
    from staleness_study import step_times as measurement

    times = measurement.measure(tuple(comparison_plan.ALTERNATIVES), steps)
    times.write(page.parent / STEP_TIMES)
    typer.echo(f"written: {page.parent / STEP_TIMES}; `compare-results` puts it into {page}")


@app.command()
def tried(
    out: Folder = OUT,
    workers: Workers = CORES,
    most: Most = None,
    known: Known = None,
    config: Annotated[str, typer.Option(help="Primary config of the task.")] = plan.ARITHMETIC,
) -> None:
    """Changes to M2PO that might win back what old data costs, on seeds that are not reported elsewhere."""
    _run(tried_plan.jobs(config)[:most], out, workers, known)


@app.command()
def tried_results(
    out: Folder = OUT,
    page: Annotated[Path, typer.Option(help="Its marked section is rewritten.")] = PAGE,
    collect: Collect = True,
    keep: Keep = False,
) -> None:
    """Put what the stage `tried` has run so far into its JSON files and docs/results.md."""
    from staleness_study import results as studied
    from staleness_study import tried_page

    found = []
    for config, path in TRIED_DATA.items():
        jobs, data = tried_plan.jobs(config), page.parent / path
        if collect:
            _collect(jobs, out, data, keep)
        if data.exists():
            found.append(studied.load(data))
    tried_page.write(found, page)
    typer.echo(f"written: {page}, {', '.join(str(page.parent / path) for path in TRIED_DATA.values())}")


@app.command()
def replay_results(
    out: Folder = OUT,
    page: Annotated[Path, typer.Option(help="Its marked section is rewritten.")] = REPLAY_PAGE,
    collect: Collect = True,
    keep: Keep = False,
) -> None:
    """Put what the stages `replay` and `replay-wall-clock` have run so far into JSON files and docs/replay.md."""
    from staleness_study import replay_page
    from staleness_study import results as studied
    from staleness_study.collect import collect_replay_clock

    data, timed = page.parent / REPLAY_DATA, page.parent / REPLAY_CLOCK_DATA
    if collect:
        _collect(replay_plan.jobs(), out, data, keep)
    if collect and (out / REPLAY_CLOCK).is_dir():
        _put(collect_replay_clock(out / REPLAY_CLOCK, plan.SEEDS), timed, keep)
    replay_page.write(*studied.load(data), studied.load(timed)[1] if timed.exists() else [], page)
    typer.echo(f"written: {page}, {data}")


@app.command()
def replay_wall_clock(
    out: Folder = OUT,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each run.")] = 1,
) -> None:
    """Time to an accuracy through verl where generation takes three times as long as training: sync, bounded_async
    without replay and with it. One run at a time, each from its last checkpoint on; wants a quiet machine.
    """
    from staleness_study import verl_runs

    failed = verl_runs.run_verl(
        out / REPLAY_CLOCK,
        Console(),
        verl_runs.REPLAY_CLOCK,
        range(1, seeds + 1),
        steps=verl_runs.REPLAY_CLOCK_STEPS,
        pace=verl_runs.SLOW_GENERATION,
        more=verl_runs.REPLAY_TIMED,
        config=verl_runs.REPLAY_CONFIG,
        recipe=verl_runs.REPLAY_RECIPE,
        measured=True,
    )
    _finish(failed)


@app.command()
def verl(
    out: Folder = OUT,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each run.")] = 1,
    wall_clock: Annotated[
        bool, typer.Option(help="stale_k_separate against sync instead, for the time to an accuracy.")
    ] = False,
) -> None:
    """The four runs that carry the claim, through verl itself, one at a time, each from its last checkpoint on.

    Then four at ten times the learning rate.
    """
    from staleness_study import verl_runs

    def run(stage: str, conditions: Sequence[verl_runs.Condition], **settings: Any) -> list[str]:
        return verl_runs.run_verl(out / stage, Console(), conditions, range(1, seeds + 1), **settings)

    if wall_clock:
        _finish(run(WALL_CLOCK, verl_runs.WALL_CLOCK, pace=verl_runs.EVEN))
        return
    failed = run(VERL, verl_runs.CLAIM)
    _finish([*failed, *run(VERL_HOT, verl_runs.HOT, more=verl_runs.HOT_OVERRIDES)])


@app.command()
def results(
    out: Folder = OUT,
    page: Annotated[Path, typer.Option(help="Its marked sections are rewritten.")] = PAGE,
    collect: Annotated[bool, typer.Option(help="Read the runs; otherwise draw from the JSON beside the page.")] = True,
    keep: Keep = False,
) -> None:
    """Put what has run so far into the JSON file, the page and its figures."""
    from staleness_study import page as pages
    from staleness_study import results as studied
    from staleness_study.collect import collect_verl

    data = page.parent / DATA
    if collect and not _collect(plan.jobs(), out, data, keep) and not keep:
        raise FileNotFoundError(f"no finished run of the study in {out}: run `python -m staleness_study run` first")
    through_verl = {}
    for stage, path in VERL_DATA.items():
        if collect and (out / stage).is_dir():
            _put(collect_verl(out / stage, stage), page.parent / path, keep)
        through_verl[stage] = studied.load(page.parent / path)[1] if (page.parent / path).exists() else []
    pages.write(*studied.load(data), through_verl, page)
    typer.echo(f"written: {page}, {data}")


@app.command("pages")
def write_pages(
    folder: Annotated[Path, typer.Option(help="Of the pages, with their JSON in its folder `results`.")] = PAGE.parent,
) -> None:
    """Every table and figure of docs/results.md and docs/replay.md again, from the JSON beside them: no run is read."""
    page = folder / PAGE.name
    for write in (results, long_results, prosperity_results, compare_results, tried_results):
        write(page=page, collect=False)
    replay_results(page=folder / REPLAY_PAGE.name, collect=False)


@app.command()
def disturbance(
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of each run.")] = 3,
    page: Annotated[Path, typer.Option(help="Its marked section is rewritten.")] = Path("docs/staleness.md"),
    out: Folder = OUT,
    verl: Annotated[bool, typer.Option(help="Through verl itself, at about eight minutes a run.")] = False,
) -> None:
    """A learning rate ten times as large for a while, under a fixed and under an adaptive bound (about ten minutes)."""
    from staleness_study import disturbance as study
    from staleness_study import disturbance_verl as through_verl

    if verl:
        data, folder = page.parent / "results" / "disturbance_verl.json", out / "disturbance"

        def train(condition: str, seed: int, schedule: study.Schedule) -> study.Run:
            return through_verl.train(condition, seed, schedule, folder, Console())

        study.run(range(1, seeds + 1), data, through_verl.SCHEDULE, typer.echo, train)
        through_verl.write(data, page)
        return
    data = page.parent / "results" / "disturbance.json"
    study.run(range(1, seeds + 1), data, study.Schedule(), typer.echo)
    study.write(data, page)


if __name__ == "__main__":
    app()

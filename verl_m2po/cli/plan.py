"""The command ``verl-m2po plan``."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from verl_m2po.ground.places import why_no_folder

if TYPE_CHECKING:
    from verl_m2po.planner.compare import Choice
    from verl_m2po.planner.facts import Facts
    from verl_m2po.planner.setting import Setting
    from verl_m2po.planner.workload import Failures

# Without numpy and the rules: `verl-m2po --help` stays fast.
ALL_MODES = ["sync", "stale_k", "stale_k_separate", "bounded_async"]


def _pairs(option: str, text: str | None) -> list[tuple[float, float]] | None:
    """ "a:b,c:d" as numbers."""
    from verl_m2po.planner.workload import PlanError

    if text is None:
        return None
    try:
        pairs = [tuple(float(part) for part in pair.split(":")) for pair in text.split(",")]
        return [(first, second) for first, second in pairs]
    except ValueError as error:
        raise PlanError(f"{option} {text} is no list of pairs of numbers, such as 0.5:900,0.9:3000") from error


def _quantiles(text: str | None) -> dict[float, float] | None:
    from verl_m2po.planner.workload import PlanError

    pairs = _pairs("--lengths", text)
    if pairs is not None and len(dict(pairs)) < len(pairs):
        raise PlanError(f"--lengths {text}: a share is given twice")
    return None if pairs is None else dict(pairs)


def _speeds(text: str | None) -> tuple[tuple[int, float], ...] | None:
    from verl_m2po.planner.workload import PlanError

    pairs = _pairs("--tokens-per-s", text)
    if pairs is None:
        return None
    if any(not requests.is_integer() for requests, _ in pairs):
        raise PlanError(f"--tokens-per-s {text}: before each colon stands a whole number of requests")
    return tuple((int(requests), speed) for requests, speed in pairs)


def _require_numbers(positive: dict[str, float | None], finite: dict[str, float | None]) -> None:
    """Options that were given: not nan, `finite` ones no inf either."""
    from verl_m2po.planner.workload import PlanError

    for option, value in positive.items():
        if value is not None and not value > 0:
            raise PlanError(f"{option} is {value:g}; it must be positive")
    for option, value in finite.items():
        if value is not None and not math.isfinite(value):
            raise PlanError(f"{option} is {value:g}; give a finite number")


def _shares(text: str) -> list[float]:
    from verl_m2po.planner.workload import PlanError

    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = [0.0]
    if not all(0 < share < 1 for share in shares):
        raise PlanError(f"--splits {text} are no shares of the devices; give numbers between 0 and 1, such as 0.5,0.75")
    return shares


def _push_s(push_s: float | None, model_billions: float | None, push_gb_per_s: float) -> float | None:
    """Two bytes a parameter."""
    from verl_m2po.planner.workload import PlanError

    if model_billions is None:
        return push_s
    if push_s is not None:
        raise PlanError(f"--push-s {push_s:g} and --model-billions {model_billions:g} both say how long a push takes")
    if not model_billions > 0 or not push_gb_per_s > 0:
        raise PlanError(f"--model-billions {model_billions:g} and --push-gb-per-s {push_gb_per_s:g} must be positive")
    return 2 * model_billions / push_gb_per_s


def buffer_bytes(facts: "Facts", setting: "Setting") -> int:
    """Memory of the waiting rollouts at full length, as the trainer modes check it before they start."""
    from omegaconf import OmegaConf

    from verl_m2po.staleness.checks.memory import estimate_buffer_bytes

    if setting.mode == "sync":
        return 0
    of_mode: dict[str, Any] = {"staleness_updates": setting.staleness_steps}
    if setting.is_replaying:
        of_mode["replay"] = asdict(setting.replay_config)
    config = {
        "trainer": {"v1": {"trainer_mode": setting.mode, setting.mode: of_mode}},
        "data": {
            "train_batch_size": facts.groups,
            "max_response_length": facts.longest,
            "max_prompt_length": max(1, facts.prompt_tokens or 0),
        },
        # One update a trainer step, as in `Setting.rule`
        "actor_rollout_ref": {"rollout": {"n": facts.responses}, "actor": {"ppo_mini_batch_size": facts.groups}},
    }
    return estimate_buffer_bytes(OmegaConf.create(config), setting.staleness_steps)


def plan(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN]", help="Log of a verl run, finished or running, to take numbers from."),
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="The ledger of that run: response lengths, and the speed of a server.")
    ] = None,
    ledger_servers: Annotated[
        int | None, typer.Option(min=1, help="Rollout servers of that run, where the config beside its log is missing.")
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Devices of the planned run.")] = None,
    server_devices: Annotated[int | None, typer.Option(help="Devices of one rollout server.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts of a trainer step.")] = None,
    responses: Annotated[int | None, typer.Option(help="Responses of a prompt.")] = None,
    updates_per_step: Annotated[int | None, typer.Option(help="Optimizer updates of a trainer step.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Tokens of a prompt, mean.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Limit on a response, tokens.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Response lengths by quantile, such as 0.5:900,0.9:3000.")] = None,
    tokens_per_s: Annotated[
        str | None,
        typer.Option(help="Tokens/s of one server by the requests it decodes, such as 32:1500,128:3500."),
    ] = None,
    max_requests: Annotated[int | None, typer.Option(help="Requests that a server decodes at once.")] = None,
    update_s: Annotated[float | None, typer.Option(help="Seconds of a trainer step without waiting and push.")] = None,
    update_devices: Annotated[
        int | None, typer.Option(help="Trainer devices that --update-s holds for; more are faster in proportion.")
    ] = None,
    push_s: Annotated[float | None, typer.Option(help="Seconds of one push of the weights.")] = None,
    model_billions: Annotated[float | None, typer.Option(help="Parameters in billions, instead of --push-s.")] = None,
    push_gb_per_s: Annotated[float, typer.Option(help="Speed of a push, with --model-billions.")] = 10.0,
    prefill_tokens_per_s: Annotated[
        float, typer.Option(help="Of one server, when a push has interrupted its requests; inf: at once.")
    ] = math.inf,
    speed_spread: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Spread of the servers' speeds, 0.05: 5%; at most 1.")
    ] = 0.0,
    update_spread: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The same of the trainer's devices; at most 1.")
    ] = 0.0,
    failures_per_device_year: Annotated[
        float, typer.Option(min=0.0, max=1000.0, help="Of any device; at most 1,000, nearly three a day.")
    ] = 0.0,
    restart_s: Annotated[float, typer.Option(min=0.0, help="Until a run that died trains again.")] = 600.0,
    checkpoint_steps: Annotated[int, typer.Option(min=1, help="Trainer steps between checkpoints.")] = 20,
    replace_s: Annotated[
        float | None,
        typer.Option(min=0.0, help="Until a lost server is replaced while the run goes on; without it, it restarts."),
    ] = None,
    modes: Annotated[list[str] | None, typer.Option(help="Modes to compare; may be given again.")] = None,
    replay: Annotated[
        list[str] | None, typer.Option(help="Options of replay= to compare beside none: x2, x4, x8 or remix.")
    ] = None,
    splits: Annotated[
        str, typer.Option(help="Shares of the devices that generate, where they do nothing else.")
    ] = "0.25,0.5,0.625,0.75,0.875",
    max_staleness: Annotated[int, typer.Option(help="Largest staleness to try, optimizer updates.")] = 8,
    target_age: Annotated[
        float | None, typer.Option(help="Largest mean age of a trained token, optimizer updates.")
    ] = None,
    run_steps: Annotated[int, typer.Option(min=1, help="Trainer steps of the whole run.")] = 1000,
    deadline: Annotated[float | None, typer.Option(help="Hours that the whole run may take.")] = None,
    cost_per_hour: Annotated[float | None, typer.Option(min=0.0, help="Of one device.")] = None,
    simulate_steps: Annotated[int, typer.Option(help="Trainer steps that count in each simulation.")] = 30,
    seed: Annotated[int, typer.Option(min=0, help="Of everything random.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Picture to write: .svg, .png or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of the table.")] = False,
) -> None:
    """Simulate how fast each mode, split of the devices and staleness would be, and how old its data: then recommend.

    Numbers come from a run, from options, or from both; an option wins. The rules are those of the trainer modes.
    """
    from verl_m2po.planner.compare import compare, recommend
    from verl_m2po.planner.facts import Assumed, Facts
    from verl_m2po.planner.workload import SECONDS_PER_YEAR, PlanError

    try:
        from verl_m2po.planner import show
    except ModuleNotFoundError as error:
        raise typer.BadParameter('the planner needs matplotlib: pip install "verl-m2po[report]"') from error
    if out is not None and out.suffix not in (".svg", ".png", ".pdf"):
        raise typer.BadParameter(f"--out is {out}; its name must end in .svg, .png or .pdf")
    if out is not None and (reason := why_no_folder(out.parent)):
        raise typer.BadParameter(f"--out: {reason}")
    try:
        _require_numbers(
            positive={"--prefill-tokens-per-s": prefill_tokens_per_s, "--deadline": deadline},
            finite={
                "--target-age": target_age,
                "--speed-spread": speed_spread,
                "--update-spread": update_spread,
                "--failures-per-device-year": failures_per_device_year,
                "--restart-s": restart_s,
                "--replace-s": replace_s,
                "--cost-per-hour": cost_per_hour,
            },
        )
        given = Facts(
            devices=devices,
            server_devices=server_devices,
            groups=batch_size,
            responses=responses,
            updates_per_step=updates_per_step,
            prompt_tokens=prompt_tokens,
            longest=max_length,
            speeds=_speeds(tokens_per_s),
            max_requests=max_requests,
            update_s=update_s,
            update_devices=update_devices,
            push_s=_push_s(push_s, model_billions, push_gb_per_s),
        )
        facts = _facts(given, run, ledger, ledger_servers, _quantiles(lengths))
        facts.require_whole(f" from {run}" if run else "")
        assumed = Assumed(
            prefill_tokens_per_s,
            speed_spread,
            update_spread,
            failures_per_device_year / SECONDS_PER_YEAR,
            _failures(restart_s, checkpoint_steps, replace_s),
        )
        shares = _shares(splits)
        compared = compare(
            facts,
            assumed,
            modes or _possible(facts.devices, bool(replay)),
            max_staleness,
            shares,
            simulate_steps,
            seed,
            run_steps,
            buffer_bytes,
            replay or (),
        )
        choices = list(compared)
        chosen = recommend(choices, target_age, deadline, run_steps)
    except PlanError as error:
        raise typer.BadParameter(str(error)) from error
    _tell(choices, chosen, run_steps, cost_per_hour, as_json)
    if out is None:
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        show.picture(choices, chosen).savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)
    except OSError as error:
        raise typer.BadParameter(f"--out is {out}, which cannot be written: {error.strerror or error}") from error
    if not as_json:
        Console().print(Text(f"written: {out}"), soft_wrap=True)


def _facts(
    given: "Facts",
    run: Path | None,
    ledger: Path | None,
    ledger_servers: int | None,
    quantiles: dict[float, float] | None,
) -> "Facts":
    """What the options say, and where they say nothing the run."""
    from verl_m2po.planner.facts import Facts
    from verl_m2po.planner.readings import read_ledger_facts, read_run
    from verl_m2po.planner.workload import PlanError, QuantileLengths

    read = Facts() if run is None else read_run(run)
    if given.update_s is not None:
        # The number of devices that a time was measured on belongs to that time.
        read = replace(read, update_devices=None)
    facts = given.over(read)
    if ledger is not None:
        servers = read.measured_servers if ledger_servers is None else ledger_servers
        if servers is None and facts.speeds is None:
            without = "RUN" if run is None else f"a config.yaml beside {run} that says so"
            raise PlanError(
                f"--ledger {ledger}: how many rollout servers generated is not known without {without}; give "
                "--ledger-servers, or the speed of one server with --tokens-per-s"
            )
        facts = facts.over(read_ledger_facts(ledger, servers))
    if quantiles is None:
        return facts
    if facts.longest is None:
        raise PlanError("--lengths needs the limit on a response: give --max-length")
    return replace(facts, lengths=QuantileLengths(quantiles, facts.longest))


def _possible(devices: int | None, has_replay: bool) -> list[str]:
    """One device cannot be split."""
    modes = ALL_MODES[:2] if devices == 1 else ALL_MODES
    return [*modes, "replay"] if has_replay else modes


def _failures(restart_s: float, checkpoint_steps: int, replace_s: float | None) -> "Failures":
    from verl_m2po.planner.workload import Failures

    common = {"restart_s": restart_s, "checkpoint_steps": checkpoint_steps}
    return Failures(**common) if replace_s is None else Failures(**common, heals=True, replace_s=replace_s)


def _tell(
    choices: list["Choice"], chosen: "Choice", run_steps: int, cost_per_hour: float | None, as_json: bool
) -> None:
    from verl_m2po.planner import show

    if as_json:
        told = {
            "settings": [show.as_json(choice, run_steps, cost_per_hour) for choice in choices],
            "recommended": show.as_json(chosen, run_steps, cost_per_hour),
            "overrides": [{"override": override, "reason": reason} for override, reason in chosen.overrides()],
        }
        typer.echo(json.dumps(told, indent=1))
        return
    # Where the output is no terminal, rich takes 80 columns, in which no number would be whole. The table takes what it
    # needs.
    console = Console(width=max(Console().width, 200))
    console.print(show.table(choices, cost_per_hour))
    console.print("Recommended:", style="bold")
    for override, reason in chosen.overrides():
        console.print(Text(f"  {override}"), Text(f"    # {reason}", style="dim"), sep="\n", soft_wrap=True)

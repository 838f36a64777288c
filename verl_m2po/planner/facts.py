"""What is known of a run before it is simulated: from numbers, from a run, or from both; what is missing is named."""

from dataclasses import dataclass, field, fields, replace

from verl_m2po.planner.workload import (
    EngineCurve,
    Failures,
    Generation,
    Lengths,
    MeasuredLengths,
    PlanError,
    Training,
    Workload,
)

# What supplies each fact, for the error that misses it.
SUPPLIES = {
    "devices": "--devices",
    "groups": "--batch-size",
    "responses": "--responses",
    "updates_per_step": "--updates-per-step",
    "longest": "--max-length",
    "lengths": "--lengths, such as 0.5:900,0.9:3000, or --ledger",
    "speeds": "--tokens-per-s, such as 32:1500,128:3500, or --ledger",
    "update_s": "--update-s, or a log with timing_s/update_actor",
    "push_s": "--push-s or --model-billions, or a log with timing_s/update_weights",
}
# Facts that a plan can do without, and the least that they may be.
OPTIONAL = {
    "server_devices": ("--server-devices", 1),
    "max_requests": ("--max-requests", 1),
    "update_devices": ("--update-devices", 1),
    "prompt_tokens": ("--prompt-tokens", 0),
}


@dataclass(frozen=True)
class Facts:
    """Each fact is None while it is not known.

    Args:
        devices: of the whole run.
        server_devices: of one rollout server, its tensor parallel size.
        groups: prompts of a trainer step.
        responses: of a prompt.
        updates_per_step: optimizer updates of a trainer step.
        prompt_tokens: of a prompt, mean.
        longest: limit on a response, tokens.
        lengths: of the responses.
        speeds: points of a server's curve, see `EngineCurve`.
        max_requests: that a server decodes at once.
        start_s: until a request's first token.
        update_s: of a trainer step without waiting and push, on `update_devices`.
        per_token_s: the part of it that each token of the batch adds.
        update_devices: devices on which `update_s` was measured; None: on as many as the plan's trainer has.
        push_s: one transfer of the weights.
        measured_servers: rollout servers of the run that was read.
    """

    devices: int | None = None
    server_devices: int | None = None
    groups: int | None = None
    responses: int | None = None
    updates_per_step: int | None = None
    prompt_tokens: int | None = None
    longest: int | None = None
    lengths: Lengths | None = None
    speeds: tuple[tuple[int, float], ...] | None = None
    max_requests: int | None = None
    start_s: float | None = None
    update_s: float | None = None
    per_token_s: float | None = None
    update_devices: int | None = None
    push_s: float | None = None
    measured_servers: int | None = None

    def over(self, other: "Facts") -> "Facts":
        """These facts, and where they are not known those of `other`."""
        known = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(other, **{name: value for name, value in known.items() if value is not None})

    def require_whole(self, source: str) -> None:
        """Whether a plan can be made of it.

        Args:
            source: where the rest was looked for, for the error.

        Raises:
            PlanError: something is missing, or contradicts something else; with the options that supply it.
        """
        missing = [f"{name} ({option})" for name, option in SUPPLIES.items() if getattr(self, name) is None]
        if missing:
            raise PlanError(f"not known{source}: {'; '.join(missing)}")
        counts = ("devices", "groups", "responses", "updates_per_step", "longest")
        for name, (option, least) in ({name: (SUPPLIES[name], 1) for name in counts} | OPTIONAL).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise PlanError(f"{option} is {value}; it must be at least {least}")
        if isinstance(self.lengths, MeasuredLengths) and self.lengths.longest > self.longest:  # pyright: ignore
            raise PlanError(
                f"--ledger holds a response of {self.lengths.longest} tokens, above --max-length {self.longest}; raise "
                "it, or give --lengths"
            )
        size = 1 if self.server_devices is None else self.server_devices
        if self.devices % size:  # pyright: ignore[reportOptionalOperand]
            raise PlanError(
                f"--devices {self.devices} is no multiple of --server-devices {size}; a server has all of its"
            )

    def workload(self, server_devices_total: int, trainer_devices: int, more: "Assumed") -> Workload:
        """What a run on so many devices would do; the facts must be whole."""
        assert self.speeds is not None and self.lengths is not None and self.update_s is not None
        assert self.groups is not None and self.responses is not None and self.push_s is not None
        server_size = self.server_devices or 1
        measured_on = self.update_devices or trainer_devices
        scale = measured_on / trainer_devices
        most = self.max_requests if self.max_requests is not None else max(256, self.speeds[-1][0])
        servers = server_devices_total // server_size
        generation = Generation(
            servers, EngineCurve(self.speeds, most), self.start_s or 0.0, more.prefill_tokens_per_s, more.speed_spread
        )
        training = Training(
            self.update_s * scale, (self.per_token_s or 0.0) * scale, self.push_s, trainer_devices, more.update_spread
        )
        failures = replace(
            more.failures,
            server_per_s=more.failures_per_device_s * server_size,
            trainer_per_s=more.failures_per_device_s * trainer_devices,
        )
        return Workload(
            self.groups, self.responses, self.lengths, generation, training, self.prompt_tokens or 0, failures
        )


@dataclass(frozen=True)
class Assumed:
    """What no log tells, and what has a default that changes nothing.

    Args:
        prefill_tokens_per_s: see `Generation`.
        speed_spread: see `Generation`.
        update_spread: `spread` of `Training`.
        failures_per_device_s: of any device, per second.
        failures: the rest of what breaking costs.
    """

    prefill_tokens_per_s: float = float("inf")
    speed_spread: float = 0.0
    update_spread: float = 0.0
    failures_per_device_s: float = 0.0
    failures: Failures = field(default_factory=Failures)

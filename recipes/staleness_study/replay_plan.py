"""The runs of the stage `replay`: is a rollout that is trained several times worth as many new ones?"""

from collections.abc import Iterable, Iterator

from staleness_study.plan import CLAIM_STEPS, SEEDS, Job

STAGE = "replay"
# What a rollout is trained on average: an option of the Hydra group ``replay``
USES = {"x2": 2, "x4": 4, "x8": 8}
# Optimizer updates: 64 and 16 trainer steps
WINDOWS = (256, 64)
METHODS = ("m2po", "grpo", "no_trust_region", "topr", "m2po_tapered", "dppo")
# The plain way to use a batch again: epochs on it before the next one
EPOCHS = 4
# As many before others run; intervals need three
FEW_SEEDS = SEEDS[:3]
# Trainer steps of 4 uses after which a third of the prompts of `CLAIM_STEPS` on-policy steps are generated
THIRD_STEPS = 1325

Condition = tuple[str, str, int]
"""(loss, reuse: empty, an option of `replay` or `EPOCHS_NAME`; window in optimizer updates)."""

EPOCHS_NAME = f"epochs{EPOCHS}"
# What the question is about; those with replay run until a third of the prompts is used up
CORE: tuple[Condition, ...] = (("grpo", "", 0), ("m2po", "x4", 256), ("grpo", "x4", 256))
FIRST: tuple[Condition, ...] = (
    *CORE,
    *(("m2po", EPOCHS_NAME, 0), ("grpo", EPOCHS_NAME, 0), ("m2po", "x2", 256), ("m2po", "x8", 256)),
    *(("m2po", "x4", 64), ("grpo", "x4", 64)),
)


def job(condition: Condition, seed: int) -> Job:
    """The run of one condition. An epoch counts as a use: `EPOCHS` of them are that many times fewer trainer steps."""
    loss, reuse, window = condition
    if reuse == EPOCHS_NAME:
        overrides = (f"actor_rollout_ref.actor.ppo_epochs={EPOCHS}",)
        return Job(STAGE, loss, 0, seed, overrides, reuse, CLAIM_STEPS // EPOCHS)
    steps = THIRD_STEPS if reuse and condition in CORE else CLAIM_STEPS
    return Job(STAGE, loss, window, seed, variant=reuse, steps=steps, replay=reuse)


def steps_shown(condition: Condition) -> int:
    """Trainer steps that make `CLAIM_STEPS` times the updates of a batch: what the conditions are compared after."""
    return CLAIM_STEPS // EPOCHS if condition[1] == EPOCHS_NAME else CLAIM_STEPS


def conditions() -> list[Condition]:
    """Each once, the most telling ones first: M2PO and GRPO, then the other methods, window by window."""
    rest = [(loss, reuse, window) for window in WINDOWS for reuse in ("x4", "x2", "x8") for loss in METHODS]
    alone = [(loss, reuse, 0) for reuse in ("", EPOCHS_NAME) for loss in METHODS]
    return list(dict.fromkeys([*FIRST, *rest, *alone]))


def jobs() -> list[Job]:
    """All runs, in the order in which they are started: what the question is about, then a few seeds of the others."""

    def seeds_of(chosen: Iterable[Condition], seeds: Iterable[int]) -> Iterator[Job]:
        yield from (job(condition, seed) for seed in seeds for condition in chosen)

    every = conditions()
    wanted = [*seeds_of(CORE, SEEDS), *seeds_of(FIRST, FEW_SEEDS), *seeds_of(every, FEW_SEEDS), *seeds_of(every, SEEDS)]
    return list(dict.fromkeys(wanted))

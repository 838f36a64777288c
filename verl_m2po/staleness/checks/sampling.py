"""Are the log-probs of the rollout those of the policy that sampled?"""

from collections.abc import Iterator

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.settings import Number
from verl_m2po.ground.verl_config import read

_ROLLOUT = "actor_rollout_ref.rollout"
TOP_P = Number(f"{_ROLLOUT}.top_p", 0, 1, is_whole=False, excludes_least=True, default=1.0, meaning="a probability")
TOP_K = Number(f"{_ROLLOUT}.top_k", -1, default=-1, meaning="a number of tokens, -1 for all")
TEMPERATURE = Number(f"{_ROLLOUT}.temperature", is_whole=False, meaning="the sampling temperature")
_TRUNCATED = "what is inside is renormalised and what is outside has probability 0, so the importance ratio is biased"


def top_p(config: DictConfig) -> Iterator[Problem]:
    """Yield a nucleus that is not everything."""
    if (value := TOP_P.of(config)) < 1:
        why = f"nucleus sampling truncates the behaviour policy: {_TRUNCATED}"
        yield Problem(TOP_P.key, value, why, "Set it to 1.0")


def top_k(config: DictConfig) -> Iterator[Problem]:
    """Yield a selection of tokens that is not everything."""
    if (value := TOP_K.of(config)) not in (-1, 0):
        why = f"top-k sampling truncates the behaviour policy: {_TRUNCATED}"
        yield Problem(TOP_K.key, value, why, "Set it to -1")


def temperature(config: DictConfig) -> Iterator[Problem]:
    """Yield a temperature that gives no probabilities, or others than the trainer computes."""
    value = TEMPERATURE.of(config)
    if value <= 0:
        yield Problem(TEMPERATURE.key, value, "greedy sampling has no behaviour probabilities", "Set it to 1.0")
    mode = read(config, f"{_ROLLOUT}.logprobs_mode", "processed_logprobs")
    if value != 1 and mode == "raw_logprobs":
        why = "the rollout reports log-probs before the temperature, the trainer computes them after it"
        yield Problem(f"{_ROLLOUT}.logprobs_mode", mode, why, "Set it to processed_logprobs")

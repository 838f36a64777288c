"""What a trajectory must be to be trained on, and which weights generated it."""

import math

from verl.experimental.agent_loop.agent_loop import AgentLoopOutput

from verl_m2po.staleness.rollout.client import Session


def spans_of(session: Session, output: AgentLoopOutput) -> tuple[tuple[int, int], ...]:
    """Weight versions of the tokens that `output` kept of what its session generated.

    The response may have been cut to its limit, so the spans are cut too. Where an agent loop generated tokens that it
    did not put into the response in order, which token is whose is unknown: all count as the oldest.
    """
    kept = sum(output.response_mask)
    if kept > session.generated_tokens or (kept < session.generated_tokens and 0 in output.response_mask):
        return ((min(version for version, _ in session.spans), kept),) if session.spans and kept else ()
    spans = []
    for version, tokens in session.spans:
        taken = min(tokens, kept)
        if taken:
            spans.append((version, taken))
        kept -= taken
    return tuple(spans)


def check_output(
    output: AgentLoopOutput, needs_log_probs: bool, max_response_tokens: int, needs_reward: bool = False
) -> None:
    """Refuse a trajectory that must not be trained on.

    Raises:
        ValueError: empty, too long, or with a mask, log-probs or a reward that are missing, misaligned or not finite.
    """
    tokens = len(output.response_ids)
    if len(output.response_mask) != tokens:
        raise ValueError(f"a mask of {len(output.response_mask)} for {tokens} response tokens")
    if not tokens or not sum(output.response_mask):
        raise ValueError("empty response")
    if tokens > max_response_tokens:
        raise ValueError(f"response of {tokens} tokens, more than the {max_response_tokens} allowed")
    if needs_log_probs:
        log_probs = output.response_logprobs
        if log_probs is None or len(log_probs) != tokens:
            found = "no" if log_probs is None else len(log_probs)
            raise ValueError(f"{found} behaviour log-probs for {tokens} response tokens")
        if not all(math.isfinite(value) for value in log_probs):
            raise ValueError("behaviour log-probs that are not finite")
    if output.reward_score is None and needs_reward:
        raise ValueError("the reward function returned nothing")
    if output.reward_score is not None and not math.isfinite(output.reward_score):
        raise ValueError(f"reward {output.reward_score} is not finite")


def first_line(error: BaseException) -> str:
    """Type and message of an error, without what follows."""
    return f"{type(error).__name__}: {error}".splitlines()[0]

"""Real runs whose speeds are chosen: a minimum time per generated token and per update, and drawn response lengths.

The time is slept, not computed, so that generation and training can overlap on two cores as they do on devices of their
own. Everything is set from outside, through extension points of verl and vLLM; nothing here runs unless it is named:

    agent loop         benchmarks.paced.agent_loop, by actor_rollout_ref.rollout.agent.agent_loop_config_path
    logits processor   benchmarks.paced.token_time:TokenTime, by engine_kwargs.vllm.logits_processors
    optimizer          benchmarks.paced.optimizer.PacedAdamW, by actor.optim.optimizer_impl and .optimizer
"""

SECONDS_PER_TOKEN = "M2PO_BENCH_SECONDS_PER_TOKEN"
"""Environment variable: engine steps begin at least this far apart, in seconds."""

SECONDS_PER_UPDATE = "M2PO_BENCH_SECONDS_PER_UPDATE"
"""Environment variable: slept in each optimizer update, in seconds."""

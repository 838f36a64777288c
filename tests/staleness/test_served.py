"""The rollout serves what the trainer has: what is noise, what is other weights, and that it is asked once."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from ray.exceptions import RayTaskError

from verl_m2po.staleness.needs import set_what_the_mode_needs
from verl_m2po.staleness.rollout import scoring
from verl_m2po.staleness.rollout.scoring import ServedCheck
from verl_m2po.staleness.watch.served import RolloutServesOtherWeights, Scores, require_served

KEY = "trainer.v1.bounded_async.served_within_nats"


def scores(trainer, **servers) -> Scores:
    return Scores(torch.tensor(trainer), {name: torch.tensor(each) for name, each in servers.items()})


log_probs = st.lists(st.floats(-8, 0, width=32), min_size=4, max_size=4)


@settings(max_examples=200, deadline=None)
@given(log_probs, log_probs, log_probs, log_probs, st.floats(0.01, 1))
def test_it_is_refused_exactly_where_it_differs_or_stands_still(trained_0, trained_1, served_0, served_1, tolerance):
    before, after = scores(trained_0, a=trained_0, b=served_0), scores(trained_1, a=trained_1, b=served_1)
    differs = (torch.tensor(served_1) - torch.tensor(trained_1)).abs().mean().item() > tolerance
    stands_still = trained_0 != trained_1 and served_0 == served_1
    try:
        largest = require_served(before, after, tolerance, KEY)
    except RolloutServesOtherWeights as refused:
        assert differs or stands_still
        assert "rollout server b" in str(refused) and KEY in str(refused)
    else:
        assert not differs and not stands_still and 0 <= largest <= tolerance


def test_a_server_that_answers_nonsense_is_refused():
    with pytest.raises(RolloutServesOtherWeights, match="by nan nats"):
        require_served(scores([-1.0], a=[-1.0]), scores([-1.0], a=[float("nan")]), 0.3, KEY)


def test_nothing_moved_is_no_frozen_rollout():
    """A learning rate that warms up from 0: neither side has changed."""
    require_served(scores([-1.0], a=[-1.1]), scores([-1.0], a=[-1.1]), 0.3, KEY)


def test_the_log_probs_of_the_response_stand_one_place_before_its_tokens():
    """Prompt of 2 tokens, response of 3: verl gives one entry per token after the first, and a filler."""
    found = [[-1.0], [-2.0], [-3.0], [-4.0], [0.0]]
    output = SimpleNamespace(extra_fields={"prompt_logprobs": found})
    assert scoring._answer(output, prompt_tokens=2).tolist() == [-2.0, -3.0, -4.0]


@pytest.mark.parametrize("tolerance", [0.3, None])
def test_it_is_asked_once_about_the_first_push_after_an_update(monkeypatch, tolerance):
    asked = []
    monkeypatch.setattr(scoring, "take_probe", lambda batch, ranks: (batch, ranks))
    monkeypatch.setattr(scoring, "score", lambda probe, *_: asked.append(probe) or scores([-1.0], a=[-1.0]))
    check = ServedCheck(KEY, tolerance, SimpleNamespace(world_size=4), lambda: {"a": None})
    check.after_push()  # a push before any update, after the start
    for step in range(3):
        for mini_batch in range(2):
            check.before_update((step, mini_batch))
        check.after_push()
        assert check.take_metrics() == ({"staleness/served_difference_nats": 0.0} if tolerance and not step else {})
    assert asked == ([((0, 0), 4)] * 2 if tolerance else [])


@pytest.mark.parametrize("busy_at", [0, 1])
def test_the_trainer_does_not_wait_for_servers_with_a_long_queue(monkeypatch, caplog, busy_at):
    answers = [scores([-1.0], a=[-1.0])] * busy_at + [TimeoutError()]

    def score(*_):
        if isinstance(answer := answers.pop(0), TimeoutError):
            raise answer
        return answer

    monkeypatch.setattr(scoring, "take_probe", lambda batch, ranks: batch)
    monkeypatch.setattr(scoring, "score", score)
    check = ServedCheck(KEY, 0.3, SimpleNamespace(world_size=1), lambda: {"a": None})
    for _ in range(3):
        check.before_update("batch")
        check.after_push()
        assert check.take_metrics() == {}
    assert not answers and caplog.text.count("is not compared") == 1 and f"{KEY}=0.3" in caplog.text


def test_rows_with_images_are_not_compared_and_it_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(scoring, "take_probe", lambda batch, ranks: None)
    check = ServedCheck(KEY, 0.3, SimpleNamespace(world_size=1), lambda: {"a": None})
    for _ in range(3):
        check.before_update("batch")
        check.after_push()
        assert check.take_metrics() == {}
    assert caplog.text.count("is not compared") == 1 and "the rows have images" in caplog.text


def test_servers_that_are_all_dead_are_compared_when_others_have_joined(monkeypatch):
    alive = {"a": None}
    monkeypatch.setattr(scoring, "take_probe", lambda batch, ranks: batch)
    monkeypatch.setattr(
        scoring, "score", lambda _probe, _actor, servers: scores([-1.0], **{name: [-1.0] for name in servers})
    )
    check = ServedCheck(KEY, 0.3, SimpleNamespace(world_size=1), lambda: alive)
    check.before_update("batch")
    alive = {}
    check.after_push()
    assert check.take_metrics() == {}
    alive = {"b": None}
    check.before_update("batch")
    check.after_push()
    assert check.take_metrics() == {"staleness/served_difference_nats": 0.0}


def test_a_server_that_cannot_score_names_the_key(monkeypatch):
    def refuse(*_):
        raise RayTaskError("generate", "traceback", ValueError("prompt_logprobs are not supported"))

    monkeypatch.setattr(scoring, "take_probe", lambda batch, ranks: batch)
    monkeypatch.setattr(scoring, "score", refuse)
    with pytest.raises(
        RuntimeError, match=rf"{KEY}=0\.3: the tokens cannot be scored \(ValueError: prompt_logprobs .* Set it to null"
    ):
        ServedCheck(KEY, 0.3, SimpleNamespace(world_size=1), lambda: {"a": None}).before_update("batch")


@pytest.mark.parametrize("mode", ["stale_k", "stale_k_separate", "bounded_async"])
@pytest.mark.parametrize("rank", [0, 8])
def test_adapters_travel_merged_where_the_rollout_has_processes_of_its_own(mode, rank):
    config = OmegaConf.create(
        {
            "data": {"train_batch_size": 8},
            "algorithm": {},
            "actor_rollout_ref": {
                "actor": {"ppo_mini_batch_size": 4},
                "model": {"lora_rank": rank, "lora": {"merge": False}},
                "rollout": {},
            },
            "trainer": {"v1": {"trainer_mode": mode}},
        }
    )
    set_what_the_mode_needs(config)
    assert config.actor_rollout_ref.model.lora.merge == (rank > 0 and mode != "stale_k")

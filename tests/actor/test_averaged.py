"""The average over the weights of past updates, by itself and in verl's real FSDP engines."""

import pytest
import torch
from actor_worker_runs import PROMPT, rollouts, row_of, run_averaging, run_averaging_kinds, save_model
from ranks import run_on_ranks
from torch import nn
from torch.testing import assert_close

from verl_m2po.actor.averaged import AveragedWeights, State
from verl_m2po.losses.family.ppo_ewma import PPOEWMAConfig


class Weights(nn.Module):
    """One parameter that is trained and one that is not."""

    def __init__(self, *values: float, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.tensor(values, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)

    def become(self, *values: float) -> None:
        with torch.no_grad():
            self.trained.copy_(torch.tensor(values))


def averaged(weights: Weights, decay: float, *later: float) -> AveragedWeights:
    average = AveragedWeights(weights.named_parameters, decay)
    for value in later:
        weights.become(value)
        average.update()
    return average


def mean_of(values: list[torch.Tensor], decay: float) -> torch.Tensor:
    """The slow obvious version: all values, each with its weight."""
    shares = torch.tensor([decay**age for age in reversed(range(len(values)))], dtype=torch.float64)
    return sum(share * value.double() for share, value in zip(shares, values, strict=True)) / shares.sum()


def test_reference_value():
    """Of the paper's code: 0, 1, 2, 3 with a decay of 0.5."""
    state = averaged(Weights(0), 0.5, 1, 2, 3).state
    assert state.total == 1.875
    assert state.means["trained"].item() == pytest.approx(2.266667, abs=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.889, 0.999])
def test_it_is_the_mean_with_falling_weights(decay):
    values = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = averaged(Weights(values[0].item()), decay, *values[1:].tolist()).state
    assert_close(state.means["trained"][0], mean_of(list(values), decay))


def test_without_decay_it_is_the_last_and_of_equal_weights_it_is_these():
    assert averaged(Weights(0), 0.0, 1, 5).state.means["trained"].item() == 5
    assert averaged(Weights(3), 0.9, 3, 3).state.means["trained"].item() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_its_place_the_parameters_have_it_and_afterwards_their_own_bits(dtype):
    weights = Weights(0.1, 0.7, dtype=dtype)
    average = AveragedWeights(weights.named_parameters, 0.889)
    weights.become(0.3, 1 / 3)
    average.update()
    assert average.state.means["trained"].dtype == torch.float32 and "frozen" not in average.state.means
    own = weights.trained.detach().clone()
    with pytest.raises(KeyError), average.in_place():
        assert torch.equal(weights.trained, average.state.means["trained"].to(dtype))
        assert weights.trained.requires_grad and not torch.equal(weights.trained, own)
        raise KeyError
    assert torch.equal(weights.trained, own)


def test_it_goes_on_from_a_state():
    weights = Weights(0)
    gone_on = AveragedWeights(weights.named_parameters, 0.5, State({"trained": torch.zeros(1).double()}, 1.5))
    weights.become(3)
    gone_on.update()
    assert gone_on.state.total == 1.75 and gone_on.state.means["trained"].item() == pytest.approx(3 / 1.75)


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, float("nan"), "slow"])
def test_a_decay_that_is_none_is_refused(decay):
    with pytest.raises(ValueError, match=r"ppo_ewma.decay must be"):
        PPOEWMAConfig(decay=decay)


ROWS, DECAY = 8, 0.6


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    model_folder = tmp_path_factory.mktemp("model")
    save_model(model_folder)
    rows = rollouts(ROWS, seed=0)

    def run(ranks, *more):
        folder = tmp_path_factory.mktemp("checkpoint")
        return run_on_ranks((ranks,), run_averaging, model_folder, rows, folder, *more)[ranks]

    return model_folder, {"one rank": run(1, DECAY), "two ranks": run(2, DECAY), "without decay": run(2, 0.0)}


def log_probs(model_folder, weights, rows):
    """{row: log-probs of its response} under `weights`, by the model itself."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.load_state_dict(weights, strict=False)
    found = {}
    for row in rows:
        with torch.no_grad():
            logits = model(row["tokens"][None]).logits[0].log_softmax(-1)
        taken = logits[PROMPT - 1 : -1].gather(-1, row["tokens"][PROMPT:, None]).squeeze(-1)
        found[row_of(row["advantages"])] = taken
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one rank", "two ranks"])
def test_the_loss_sees_the_policy_with_the_mean_of_all_weights_so_far(runs, name):
    model_folder, of = runs
    rows, history = rollouts(ROWS, seed=0), of[name][0]["weights"]
    seen = [{row: values for rank in of[name] for row, values in rank["ahead"][i].items()} for i in range(4)]
    for i, ahead in enumerate(seen):
        means = {key: mean_of([weights[key] for weights in history[: i + 1]], DECAY).float() for key in history[0]}
        expected = log_probs(model_folder, means, rows)
        for row, values in ahead.items():
            counted = rows[row]["response_mask"][: len(values)]
            assert_close(values[counted], expected[row][: len(values)][counted], atol=2e-5, rtol=1e-4)
    assert any(not torch.allclose(seen[3][row], seen[0][row], atol=1e-3) for row in seen[0]), "it moves"


@pytest.mark.slow
def test_a_restart_goes_on_with_the_average(runs):
    for ranks in runs[1].values():
        for found in ranks:
            *_, uninterrupted, restarted = found["ahead"]
            assert all(torch.equal(uninterrupted[row], restarted[row]) for row in uninterrupted)
            assert found["loss"][-1] == found["loss"][-2]


@pytest.mark.slow
def test_ranks_share_it_out_and_train_the_same(runs):
    one, two = runs[1]["one rank"][0], runs[1]["two ranks"][0]
    for key, values in one["weights"][-1].items():
        assert_close(two["weights"][-1][key], values, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_without_decay_it_is_the_present_policy(runs):
    model_folder, of = runs
    rows = rollouts(ROWS, seed=0)
    for rank in of["without decay"]:
        for weights, ahead in zip(rank["weights"], rank["ahead"][:4], strict=False):
            expected = log_probs(model_folder, weights, rows)
            for row, values in ahead.items():
                counted = rows[row]["response_mask"][: len(values)]
                assert_close(values[counted], expected[row][: len(values)][counted], atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_however_the_parameters_are_shared_out():
    for rank in run_on_ranks((2,), run_averaging_kinds)[2]:
        mean, before, _ = rank["none"]
        assert (mean - before).abs().max() > 0.01, "or nothing is shown"
        for found in rank.values():
            assert_close(found, (mean, before, before))

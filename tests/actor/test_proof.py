"""A run whose first update is not what was asked for ends with an error that says which key, and why."""

import pytest
from actor_worker_runs import rollouts, save_model
from proof_runs import run_all
from ranks import run_on_ranks

from verl_m2po.ground.modes import MODES
from verl_m2po.plugin import EXTENSIONS

pytestmark = pytest.mark.slow

ROWS = 8


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    return run_on_ranks((1,), run_all, folder, rollouts(ROWS, seed=0))[1][0]


@pytest.mark.parametrize(
    "case", ["m2po", "m2po with entropy", "vanilla in a mode", "verl's mode", "nothing of ours, thrown away"]
)
def test_what_was_asked_for_goes_on(errors, case):
    assert errors[case] is None


@pytest.mark.parametrize("case", ["m2po without the mode", "vanilla without the mode"])
def test_another_trainer_than_the_one_that_was_asked_for_is_named(errors, case):
    assert errors[case].startswith("NotWhatWasAskedError: trainer.v1.trainer_mode=stale_k was asked for")
    assert "never reads trainer.v1" in errors[case]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("thrown away", "'m2po' was asked for, and the first update threw it away: 0 of 4 results"),
        ("weighed by zero", "'m2po' was asked for, and the first update threw it away: 0 of 4 results"),
        ("loss_mode of ours, thrown away", "'no_trust_region' was asked for, and the first update threw it away"),
        ("never called", "'m2po' was asked for, and the first update was made without calling it"),
    ],
)
def test_a_loss_that_does_not_train_is_named(errors, case, said):
    assert said in errors[case]


def test_only_the_first_update_that_ends_is_watched_and_nothing_of_it_stays(errors):
    assert errors["watched"] == [True, True, False] and errors["restored"]


def test_the_modes_are_those_that_the_plugin_registers():
    (registered,) = (extension.names for extension in EXTENSIONS if extension.what == "trainer mode")
    assert registered == MODES

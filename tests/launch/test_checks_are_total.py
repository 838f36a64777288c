"""A check that cannot answer is one refusal more, and silences no other: Hydra would make a warning of its error."""

import copy
import logging

import hypothesis.strategies as st
import pytest
from compose import composed, verl_hydra
from hydra import compose
from hypothesis import HealthCheck, given, settings
from omegaconf import OmegaConf

from verl_m2po.ground import verl_config
from verl_m2po.ground.check import Check, ask_all
from verl_m2po.ground.problem import Problem
from verl_m2po.launch import callback, registry
from verl_m2po.launch.checks import outputs

MODEL = "actor_rollout_ref.model.path"
SKIPPING, TOP_K = "skip.rollout_tq.enable", "actor_rollout_ref.rollout.top_k"
VALIDATION = "data.val_files"
# Refused in every run below, by three checks that have nothing to do with each other.
WRONG = (
    "trainer.v1.trainer_mode=stale_k",
    "trainer.v1.stale_k.staleness_updates=8",
    f"{SKIPPING}=true",
    f"{TOP_K}=50",
    f"{VALIDATION}=/no/such.parquet",
)


@pytest.fixture(scope="module")
def base(tiny, addition):
    """A CPU run of a staleness mode with three things wrong, as Hydra hands it to a callback."""
    with verl_hydra():
        overrides = ["hardware=cpu", f"{MODEL}={tiny}", f"data.train_files={addition / 'train.parquet'}", *WRONG]
        return compose("arithmetic", overrides=overrides, return_hydra_config=True)


def changed(base, key, value):
    config = copy.deepcopy(base)
    OmegaConf.update(config, key, value, merge=False, force_add=True)
    return config


def refused(config) -> dict[str, str]:
    """What is said of each key that is refused."""
    return {problem.key: str(problem) for problem in registry.problems(config, is_ours=True) if problem.is_fatal}


def test_a_check_that_raises_names_itself_and_the_key_and_the_others_speak(caplog):
    def falls_over(config):
        yield Problem("a", 1, "it is odd", "Set a=2")
        raise KeyError(verl_config.read(config, "b.c"))

    others = Check("other things", lambda config: [Problem("d", 3, "it is odd", "Set d=2")], "d")
    with caplog.at_level(logging.DEBUG):
        found = ask_all([Check("this", falls_over, "e"), others], OmegaConf.create({"b": {"c": "x"}}))
    assert [problem.key for problem in found] == ["a", "b.c", "d"]
    assert str(found[1]) == "b.c=x: the check of this cannot judge it (KeyError: 'x'). Correct its value."
    assert found[1].is_fatal and "Traceback" in caplog.text


def test_an_interpolation_that_leads_nowhere_is_named():
    config = OmegaConf.create({"a": "${no.such}"})
    (problem,) = ask_all([Check("this", lambda config: verl_config.read(config, "a"), "a")], config)
    assert problem.key == "a" and "no.such" in problem.why


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("actor_rollout_ref.rollout.temperature", None),
        ("actor_rollout_ref.rollout.temperature", float("nan")),
        ("actor_rollout_ref.rollout.top_p", None),
        ("actor_rollout_ref.rollout.n", None),
        ("actor_rollout_ref.rollout.n", 0),
        ("actor_rollout_ref.rollout.n", -1),
        ("actor_rollout_ref.rollout.n", 2.5),
        ("data.max_prompt_length", None),
        ("data.max_prompt_length", "64"),
        ("data.max_response_length", None),
        ("trainer.total_training_steps", "10"),
        ("trainer.total_training_steps", 6.0),
        ("trainer.save_freq", "5"),
        ("transfer_queue.backend.SimpleStorage.total_storage_size", "x"),
        ("trainer.default_local_dir", None),
        ("trainer.experiment_name", "x" * 245),
        ("trainer.v1.stale_k.generation_timeout_s", float("nan")),
        ("trainer.v1.stale_k.stop_wait_s", float("nan")),
        ("trainer.v1.stale_k.buffer_memory_limit_gib", float("nan")),
        ("trainer.v1.stale_k.staleness_updates", float("nan")),
        ("trainer.v1.stale_k.ledger_path", "/"),
        ("trainer.v1.stale_k.ledger_path", "/proc/no/such/ledger.jsonl"),
        ("data.train_files", 3),
        (MODEL, 3),
    ],
)
def test_what_is_no_value_is_refused_by_its_key_beside_the_other_refusals(base, key, value):
    found = refused(changed(base, key, value))
    assert {key, SKIPPING, TOP_K, VALIDATION} <= found.keys()
    remedy = found[key].partition(": ")[2]
    assert any(verb in remedy for verb in ("Set it", "Name ", "Shorten it", "settings are")), found[key]


@pytest.mark.parametrize("bound", ["-4", "6.0", "nan GiB"])
def test_no_remedy_is_a_number_that_makes_no_sense(base, bound):
    for value in (0, 6.0, float("nan")):
        config = changed(base, "trainer.total_training_steps", value)
        OmegaConf.update(config, "trainer.v1.stale_k.buffer_memory_limit_gib", value)
        assert not [text for text in refused(config).values() if bound in text.partition("Set it to")[2]]


@pytest.mark.parametrize(
    "written",
    [b"{", b"[1]", '{"max_position_embeddings": 4096}'.encode("utf-16"), b'{"max_position_embeddings": "many"}'],
    ids=["cut", "list", "utf-16", "string"],
)
def test_a_model_config_that_is_none_is_refused_by_the_model(base, tmp_path, written):
    (tmp_path / "config.json").write_bytes(written)
    found = refused(changed(base, MODEL, str(tmp_path)))
    assert {MODEL, SKIPPING, TOP_K, VALIDATION} <= found.keys()
    assert "config.json" in found[MODEL]


def test_an_invalid_hub_id_offline_is_refused(base, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = refused(changed(base, MODEL, "not a model!"))
    assert {MODEL, SKIPPING, TOP_K, VALIDATION} <= found.keys()
    assert "no hub id" in found[MODEL]


def test_a_pointer_that_is_a_folder_and_a_path_that_is_a_number_are_refused(base, tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").mkdir()
    auto = changed(base, "trainer.default_local_dir", str(tmp_path))
    auto = changed(auto, "trainer.resume_mode", "auto")
    assert {SKIPPING, TOP_K, VALIDATION, "trainer.default_local_dir"} <= refused(auto).keys()
    by_path = changed(changed(base, "trainer.resume_mode", "resume_path"), "trainer.resume_from_path", 3)
    assert {SKIPPING, TOP_K, VALIDATION, "trainer.resume_from_path"} <= refused(by_path).keys()


def test_a_slash_behind_a_checkpoint_is_answered_with_the_path_without(base):
    config = changed(base, "trainer.resume_mode", "resume_path")
    found = refused(changed(config, "trainer.resume_from_path", "/a/global_step_5/"))
    assert found["trainer.resume_from_path"].endswith("Set it to /a/global_step_5.")


def test_a_corrupt_file_does_not_hide_that_the_age_disappears(base, tmp_path):
    """The run that trained: a refusal of another check was lost with the error of this one."""
    (tmp_path / "corrupt.parquet").write_bytes(b"PAR1" + b"\0" * 64 + b"PAR1")
    config = composed(
        *("trainer.v1.trainer_mode=colocate_async", "algorithm.rollout_correction.bypass_mode=false"),
        f"data.val_files={tmp_path / 'corrupt.parquet'}",
    )
    with pytest.raises(SystemExit) as refusal:
        callback.PreflightCallback().on_job_start(config)
    assert "age of the data disappears" in str(refusal.value) and "not valid parquet" in str(refusal.value)


@pytest.fixture(scope="module")
def keys_that_are_read(base):
    """Every key that any check looks at."""
    read, select = set(), OmegaConf.select

    def recording(config, key, **more):
        if not key.startswith("hydra"):
            read.add(key)
        return select(config, key, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "select", recording)
        refused(base)
    assert {SKIPPING, TOP_K, VALIDATION, MODEL, "trainer.save_freq"} <= read
    return sorted(read)


GARBAGE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=300).filter(lambda text: "$" not in text and "?" not in text),
    st.lists(st.one_of(st.none(), st.integers(), st.text("ab/", max_size=3)), max_size=3),
    st.dictionaries(st.text("ab", min_size=1, max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_garbage_anywhere_lets_no_error_out_and_no_refusal_disappear(base, keys_that_are_read, data):
    key = data.draw(st.sampled_from(keys_that_are_read))
    value = data.draw(GARBAGE)
    try:
        config = changed(base, key, value)
    except Exception:
        return  # OmegaConf itself refuses the value there: it cannot stand in a config
    found = refused(config)
    decides_whether_it_is_asked = ("trainer.v1.trainer_mode", "data.custom_cls")
    expected = {SKIPPING, TOP_K, VALIDATION}
    if key.startswith(decides_whether_it_is_asked):
        return
    assert {name for name in expected if not (name == key or name.startswith(f"{key}."))} <= found.keys(), found


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_the_callback_ends_a_run_with_garbage_or_lets_it_through_and_never_raises_an_error(
    base, keys_that_are_read, data
):
    config = base
    for key in data.draw(st.lists(st.sampled_from(keys_that_are_read), min_size=1, max_size=3)):
        try:
            config = changed(config, key, data.draw(GARBAGE))
        except Exception:
            return
    with pytest.raises(SystemExit):  # of the three things wrong, if of nothing else
        callback.PreflightCallback().on_job_start(config)


def test_a_folder_of_checkpoints_below_the_home_is_named_as_verl_takes_it(base, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.chdir(tmp_path)
    config = changed(changed(base, "trainer.save_freq", 5), "trainer.default_local_dir", "~/checkpoints")
    (said,) = (problem for problem in outputs.checkpoints(config))
    assert not said.is_fatal and f"{tmp_path}/~/checkpoints" in str(said)
    assert said.remedy == "Set it to /home/somebody/checkpoints"

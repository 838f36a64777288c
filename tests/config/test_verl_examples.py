"""verl's own example scripts: unchanged by the plugin, and trained with M2PO at staleness 256 by three overrides."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import generate_compatibility
import pytest
from composing import ADDED, REPLACED, additions, all_composed, changes, select
from omegaconf import OmegaConf
from pages import with_section
from verl.utils.config import omega_conf_to_dataclass
from verl_examples import (
    COMPOSING,
    M2PO_AT_256,
    REFUSED_BY_VERL,
    REFUSED_BY_VERLS_DATACLASS,
    SCRIPTS,
    counts,
    requests,
    rows,
)

# About 260 compositions in two processes: a minute on two idle cores.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Compositions(NamedTuple):
    """Every script: by verl alone, with the plugin, and with M2PO at staleness 256 appended."""

    verl: dict[str, dict | str]
    plugin: dict[str, dict | str]
    m2po: dict[str, dict | str]


@pytest.fixture(scope="module")
def compositions(tmp_path_factory) -> Compositions:
    directory = tmp_path_factory.mktemp("sglang_multiturn")
    alone, at_256 = requests({}, directory), requests(M2PO_AT_256, directory)
    with ThreadPoolExecutor() as pool:
        verls = pool.submit(all_composed, alone, plugin=False)
        both = all_composed([*alone, *at_256], plugin=True)
    return Compositions(
        verl=dict(zip(SCRIPTS, verls.result(), strict=True)),
        plugin=dict(zip(SCRIPTS, both[: len(SCRIPTS)], strict=True)),
        m2po=dict(zip(SCRIPTS, both[len(SCRIPTS) :], strict=True)),
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_plugin_adds_keys_and_changes_no_value(script, compositions):
    before, after = compositions.verl[script], compositions.plugin[script]
    if script in REFUSED_BY_VERL:
        # An option that does not exist is answered with the search path as well, which the plugin adds to.
        before, after = (message.partition("Config search path:")[0] for message in (before, after))
        assert before == after and REFUSED_BY_VERL[script] in before
        return
    assert isinstance(before, dict) and isinstance(after, dict), (before, after)
    assert changes(before, after) == REPLACED
    assert additions(before, after) == ADDED


@pytest.mark.parametrize("script", COMPOSING)
def test_three_overrides_change_three_settings(script, compositions):
    after = compositions.m2po[script]
    assert isinstance(after, dict), after
    assert changes(compositions.plugin[script], after) == M2PO_AT_256.keys()
    assert {key: str(select(after, key)) for key in M2PO_AT_256} == M2PO_AT_256


@pytest.mark.parametrize("script", COMPOSING)
def test_m2po_reaches_the_actor_and_wins_over_the_scripts_own_loss(script, compositions):
    actor = OmegaConf.create(compositions.m2po[script]).actor_rollout_ref.actor
    if script in REFUSED_BY_VERLS_DATACLASS:
        with pytest.raises(Exception, match=REFUSED_BY_VERLS_DATACLASS[script]):
            omega_conf_to_dataclass(actor)
        return
    policy_loss = omega_conf_to_dataclass(actor).policy_loss
    assert (policy_loss.loss_mode, policy_loss.m2po.threshold) == ("m2po", 0.04)


@pytest.mark.parametrize("script", sorted(set(COMPOSING) - set(REFUSED_BY_VERLS_DATACLASS)))
def test_without_our_override_its_own_loss_stays(script, compositions):
    actor = OmegaConf.create(compositions.plugin[script]).actor_rollout_ref.actor
    own = SCRIPTS[script]["settings"].get("actor_rollout_ref.actor.policy_loss.loss_mode", "vanilla")
    assert omega_conf_to_dataclass(actor).policy_loss.loss_mode == own


WRITE = "run: python docs/generate_compatibility.py"


def test_the_compatibility_page_tells_what_becomes_of_each(compositions):
    table, page = list(rows(compositions.m2po)), generate_compatibility.PAGE
    numbers = generate_compatibility.wrapped(counts(table))
    assert with_section(page.read_text(), "verl's scripts", "\n".join(table)) == page.read_text(), WRITE
    for page in (generate_compatibility.PAGE, generate_compatibility.README):
        assert with_section(page.read_text(), "verl's scripts in numbers", numbers) == page.read_text(), WRITE


def test_the_compatibility_page_tells_what_becomes_of_each_entry_point(tmp_path):
    table, page = "\n".join(generate_compatibility.entry_points(tmp_path)), generate_compatibility.PAGE.read_text()
    assert with_section(page, "entry points", table) == page, WRITE
    assert table.count("refused: trainer.v1.trainer_mode") == 3

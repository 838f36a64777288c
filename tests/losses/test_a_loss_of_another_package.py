"""A loss is one file and one option: one that is added from outside trains on the experiment bench."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

LOSS = '''
from dataclasses import dataclass

from verl.base_config import BaseConfig

from verl_m2po.losses.kernel.needs import BEHAVIOUR
from verl_m2po.losses.kernel.record import Loss, TokenLoss
from verl_m2po.losses.kernel.registry import register


@dataclass
class PlainConfig(BaseConfig):
    """Settings of the loss `plain`.

    Args:
        scale: Factor of the loss; 0 switches it off.
    """

    scale: float = 1.0


def plain_tokens(tokens, settings):
    weighted = -settings.scale * tokens.advantages
    return TokenLoss(weighted * tokens.log_prob, weighted, tokens.mask)


register(Loss("plain", "REINFORCE", plain_tokens, settings=PlainConfig, needs=BEHAVIOUR, presets=("plain",)))
'''
OPTION = """# @package _global_
algorithm:
  policy_loss: plain
  rollout_correction:
    bypass_mode: true
actor_rollout_ref:
  rollout:
    calculate_log_probs: true
  actor:
    policy_loss:
      plain:
        scale: 0.5
"""
RUN = """
import json
from verl_m2po import plugin
from verl_m2po.cli import registries
from verl_m2po.one_process import setup as setups
from verl_m2po.one_process.train import Bench

setup = setups.read([
    "hydra.searchpath=[pkg://my_losses_config]", "loss=plain", "data.train_batch_size=4",
    "actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.rollout.n=2",
    "trainer.v1.trainer_mode=stale_k", "trainer.v1.stale_k.staleness_updates=2", "trainer.total_training_steps=2",
])
bench = Bench(setup, setups.base_model(), digits=setups.RECIPE.digits)
before = [parameter.detach().clone() for parameter in bench.model.parameters()]
metrics = [bench.learner.train_step(bench.batch(step).batch) for step in (1, 2)]
moved = sum(float((new - old).abs().sum()) for new, old in zip(bench.model.parameters(), before, strict=True))
losses = next(e for e in plugin.EXTENSIONS if e.what == "policy loss")
print(json.dumps({
    "scale": setup.actor.policy_loss.plain.scale,
    "moved": moved,
    "updates": [len(step["actor/m2po/kl"]) for step in metrics],
    "origin": registries.origins(losses)["plain"],
}))
"""


@pytest.fixture
def site(tmp_path):
    """A folder with a distribution that has one loss in one file, and one option."""
    for package in ("my_losses", "my_losses_config/loss"):
        (tmp_path / package).mkdir(parents=True)
    (tmp_path / "my_losses" / "__init__.py").touch()
    (tmp_path / "my_losses" / "plain.py").write_text(LOSS)
    (tmp_path / "my_losses_config" / "__init__.py").touch()
    (tmp_path / "my_losses_config" / "loss" / "plain.yaml").write_text(OPTION)
    info = tmp_path / "my_losses-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-losses\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[verl_m2po.losses]\nmine = my_losses\n")
    return tmp_path


def test_it_is_found_configured_and_trained_two_steps(site):
    path = os.pathsep.join((str(site), *sys.path))
    done = subprocess.run(
        [sys.executable, "-c", RUN], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found.pop("moved") > 0
    assert found == {"scale": 0.5, "updates": [2, 2], "origin": "my_losses.plain"}

"""The reference of the KL loss between two policies, and the step at which training begins anew; after ReMix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rollout_simulation import Simulation, Workload
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.core_algos import kl_penalty

from verl_m2po.staleness import reference, reincarnation
from verl_m2po.staleness.checks.reference import LINEAR
from verl_m2po.staleness.config import ReferenceConfig
from verl_m2po.staleness.rule.replay import Replay
from verl_m2po.staleness.rule.reuse import Reuse

REMIX = ReferenceConfig(least_base_share=0.5)


@pytest.mark.parametrize(
    ("step", "share"), [(1, 1), (50, 1), (51, 0.9), (60, 0.9), (61, 0.8), (75, 0.7), (100, 0.5), (900, 0.5)]
)
def test_the_share_of_the_base_falls_as_in_remix(step, share):
    assert reference.base_share(REMIX, step) == pytest.approx(share)
    assert reference.base_share(ReferenceConfig(), step) == 1


def test_after_the_reincarnation_there_is_one_base_again():
    settings = ReferenceConfig(least_base_share=0.5, reincarnate_after_steps=100)
    assert reference.base_share(settings, 100) == 0.5 and reference.base_share(settings, 101) == 1


log_probs = st.lists(st.floats(-20, 0), min_size=3, max_size=3)


@pytest.mark.parametrize("kind", [*LINEAR, "low_var_kl+", "k3+", "k1+"])
@given(share=st.floats(0, 1), present=log_probs, base=log_probs, precedent=log_probs)
def test_a_kl_loss_to_the_mixture_has_the_gradient_of_the_mixture_of_two(kind, share, present, base, precedent):
    present, base, precedent = (torch.tensor(each, dtype=torch.float64) for each in (present, base, precedent))
    present.requires_grad_()

    def gradient(loss):
        return torch.autograd.grad(loss.sum(), present)[0]

    two = share * kl_penalty(present, base, kind) + (1 - share) * kl_penalty(present, precedent, kind)
    one = kl_penalty(present, share * base + (1 - share) * precedent, kind)
    torch.testing.assert_close(gradient(one), gradient(two), rtol=1e-9, atol=1e-9)


def test_the_kl_to_the_mixture_is_the_mixture_of_the_kls():
    """Over whole distributions, not one sample: the identity that the module states."""
    present, base, precedent = torch.softmax(torch.randn(3, 7, generator=torch.Generator().manual_seed(0)), -1)
    share = 0.3
    mixture = share * base.log() + (1 - share) * precedent.log()

    def kl(other):
        return (present * (present.log() - other)).sum()

    torch.testing.assert_close(kl(mixture), share * kl(base.log()) + (1 - share) * kl(precedent.log()))


def test_the_reference_log_probs_of_a_batch_are_mixed(monkeypatch):
    def nested(*rows):
        return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)

    stored = {"ref_log_prob": nested([-1.0, -2.0], [-4.0]), "old_log_probs": nested([-3.0, -2.0], [0.0])}
    put = {}
    monkeypatch.setattr(reference.tq, "kv_batch_get", lambda **_: TensorDict(stored, batch_size=2))
    monkeypatch.setattr(reference.tq, "kv_batch_put", lambda **given: put.update(given))
    reference.mixed(KVBatchMeta(partition_id="train", keys=["a", "b"], tags=[{}, {}]), 0.75)
    assert [row.tolist() for row in put["fields"]["ref_log_prob"].unbind()] == [[-1.5, -2.0], [-3.0]]


def test_after_the_last_step_of_reuse_every_batch_is_new_and_the_pool_is_deleted():
    rule = Replay(6, 8, Reuse(None, 2), steps_of_reuse=10)
    work = Workload(length=lambda rng: rng.uniform(5, 50), rows=1, overlaps=False)
    trace = Simulation(rule, work, seed=1).run(20)
    seen, replayed = set(), {version: 0 for version in range(20)}
    for version, _, group in trace.trained:
        replayed[version] += group.ticket.uid in seen
        seen.add(group.ticket.uid)
    assert all(replayed[version] > 0 for version in range(1, 10))
    assert not any(replayed[version] for version in range(10, 20))
    assert rule.stored_groups() == []


def two_models():
    torch.manual_seed(1)
    return [torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)) for _ in range(2)]


def test_weights_are_copied_kept_and_taken_back(tmp_path):
    actor, ref = two_models()
    reincarnation.copy_weights(actor, ref)
    path = tmp_path / "kept" / "rank_0_of_1.safetensors"
    reincarnation.save_weights(ref, path)
    wanted = {name: each.clone() for name, each in actor.state_dict().items()}
    with torch.no_grad():
        for each in ref.parameters():
            each.add_(1)
    reincarnation.load_weights(ref, path)
    for name, each in ref.state_dict().items():
        torch.testing.assert_close(each, wanted[name], rtol=0, atol=0)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    with pytest.raises(FileNotFoundError, match="after its reincarnation, whose reference is lost"):
        reincarnation.load_weights(ref, tmp_path / "elsewhere.safetensors")

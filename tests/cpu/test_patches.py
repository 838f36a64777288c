"""Two runs on one machine do not take each other's weights: each Ray cluster has weight sockets of its own."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import verl

from verl_m2po.patches import verl as patches

NAME = "ipc:///tmp/rl-colocate-zmq-01000000-replica-0-rank-0.sock"


@pytest.fixture
def ends():
    """verl's two modules, reduced to what names the socket, patched twice."""

    class ServerAdapter:
        def __init__(self) -> None:
            self.zmq_handle = NAME

    class vLLMColocateWorkerExtension:
        def _get_zmq_handle(self) -> str:
            return NAME

    sender, receiver = SimpleNamespace(ServerAdapter=ServerAdapter), SimpleNamespace()
    receiver.vLLMColocateWorkerExtension = vLLMColocateWorkerExtension
    for _ in range(2):
        patches.give_each_cluster_its_weight_sockets(sender)
        patches.find_the_weight_sockets_of_this_cluster(receiver)
    return lambda: (ServerAdapter().zmq_handle, vLLMColocateWorkerExtension()._get_zmq_handle())


def test_both_ends_of_a_run_meet_at_a_socket_that_no_other_run_has(ends, monkeypatch):
    monkeypatch.setenv("RAY_RAYLET_PID", "17")
    first = ends()
    monkeypatch.setenv("RAY_RAYLET_PID", "18")
    second = ends()
    assert first[0] == first[1] == NAME.replace("zmq-", "zmq-17-")
    assert second[0] == second[1] != first[0]


@pytest.mark.parametrize("module", ["vllm_rollout", "utils"])
def test_verl_still_names_the_sockets_that_way(module):
    source = Path(verl.__file__).parent / "workers" / "rollout" / "vllm_rollout" / f"{module}.py"
    assert 'f"ipc:///tmp/rl-colocate-zmq-{job_id}-replica-' in source.read_text()


def test_a_critic_attends_as_its_configuration_says(tiny):
    """verl's own asks for flash attention, and calls its refusal a model without a value head."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(tiny, num_labels=1, attn_implementation="sdpa")
    module = SimpleNamespace(load_valuehead_model=lambda *_: pytest.fail("verl's own was called"))
    patches.load_critics_without_flash_attention(module)
    critic = module.load_valuehead_model(tiny, torch.float32, config, False)
    assert critic.config._attn_implementation == "sdpa" and critic.score.out_features == 1

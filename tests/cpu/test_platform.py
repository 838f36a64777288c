"""The CPU platform: opt-in, and complete."""

import os
import subprocess
import sys

import pytest
import torch
from verl.plugin.platform.platform_base import PlatformBase

from verl_m2po.cpu.device_module import device_module
from verl_m2po.cpu.platform import PlatformCPU

pytestmark = pytest.mark.slow


def python(code: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_never_detected_by_itself():
    code = "import verl; from verl.plugin.platform import get_platform; print(get_platform().device_name)"
    assert python(code) != "cpu"


def test_chosen_by_the_environment():
    code = "import verl; from verl.plugin.platform import get_platform; print(get_platform().device_name)"
    assert python(code, VERL_PLATFORM="cpu") == "cpu"


def test_implements_all_of_verls_platform():
    assert not getattr(PlatformCPU, "__abstractmethods__", None)
    assert issubclass(PlatformCPU, PlatformBase)


def test_tensors_move_to_its_current_device():
    assert torch.ones(1).to(PlatformCPU().current_device()).device.type == "cpu"


@pytest.mark.parametrize("name", ["max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved"])
def test_memory_counters_are_bytes_of_this_process(name):
    assert 10 * 2**20 < getattr(device_module, name)() < 2**40


def test_random_state_round_trip():
    state = device_module.get_rng_state()
    first = torch.rand(3)
    device_module.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


def test_what_torch_cpu_has_is_torch_cpus():
    assert device_module.device_count() == torch.cpu.device_count()
    with pytest.raises(AttributeError):
        _ = device_module.no_such_call


def test_process_group_backend_patch():
    """Without the patch torch refuses "cpu:gloo,cpu:gloo"."""
    code = (
        "import os; os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT='0', RANK='0', WORLD_SIZE='1')\n"
        "import verl, torch, tempfile\n"
        "from verl.utils.distributed import initialize_global_process_group_ray as init\n"
        "os.environ['DIST_INIT_METHOD'] = 'file://' + tempfile.mktemp()\n"
        "init(); print(torch.distributed.get_backend())"
    )
    assert python(code, VERL_PLATFORM="cpu", GLOO_SOCKET_IFNAME="lo") == "cpu:gloo"


def test_vllm_version_patch():
    code = "import verl; from importlib.metadata import version; print(version('vllm'))"
    assert python(code, VERL_PLATFORM="cpu").endswith("+cpu")


def test_patches_stay_away_without_the_platform():
    code = (
        "import verl, importlib.metadata, verl.utils.fsdp_utils as f\n"
        "print(hasattr(f.fsdp2_sharded_save_to_cpu, '__m2po_patch__')"
        " or hasattr(importlib.metadata.version, '__m2po_patch__'))"
    )
    assert python(code) == "False"


def test_saved_parameters_are_copies():
    """The patch must turn verl's alias into a copy, once, however often it is applied."""
    from types import SimpleNamespace

    from verl_m2po.patches import verl as patches

    parameter = torch.zeros(2)
    module = SimpleNamespace(fsdp2_sharded_save_to_cpu=lambda model: ({"w": (model.detach().cpu(), None)}, "spec"))
    patches.copy_saved_parameters(module)
    once = module.fsdp2_sharded_save_to_cpu
    patches.copy_saved_parameters(module)
    assert module.fsdp2_sharded_save_to_cpu is once
    state, spec = module.fsdp2_sharded_save_to_cpu(parameter)
    parameter.add_(1)
    assert state["w"][0].tolist() == [0, 0]
    assert spec == "spec"

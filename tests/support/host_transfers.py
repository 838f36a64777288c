"""An accelerator without one: tensors without values, and a watch over what goes between them and the host.

On the device "meta" there is nothing to read. So `.item()`, `bool(tensor)`, `.tolist()`, `nonzero` and selection by a
mask fail, and with them all that would make the host wait for a GPU. Copies to the device, which wait as well, are let
through there; `no_host_transfers` refuses them.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FROM_HOST_DATA = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}


class HostTransferError(AssertionError):
    """Something was copied between the host and the device."""


class _NoHostData(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in FROM_HOST_DATA and result.device.type != "cpu":
            raise HostTransferError(f"{func.__name__} copies from the host.")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and any(
            isinstance(index, list) for index in (args[1] if isinstance(args[1], tuple) else (args[1],))
        ):
            raise HostTransferError(f"The indices {args[1]} are copied from the host.")
        return result


class _OneDevice(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1:
            raise HostTransferError(f"{func} copies between {' and '.join(sorted(devices))}.")
        return result


@contextlib.contextmanager
def no_host_transfers():
    """Inside, whatever copies between the host and a device fails; what reads a device fails for "meta" anyway."""
    with _NoHostData(), _OneDevice():
        yield


def without_values(*tensors):
    """Tensors of the same shapes and dtypes on the device "meta"."""
    return [torch.empty_like(tensor, device="meta") for tensor in tensors]

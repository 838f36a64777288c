"""A real TransferQueue on a small local Ray."""

import pytest


@pytest.fixture(scope="module")
def transfer_queue():
    """TransferQueue with one storage unit; closed, with its Ray, at the end of the module."""
    import ray
    import transfer_queue as tq
    from omegaconf import OmegaConf

    # Logical CPUs: the controller takes one, each storage unit another.
    ray.init(
        "local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20, _node_ip_address="127.0.0.1"
    )
    backend = {"SimpleStorage": {"num_data_storage_units": 1}}
    tq.init(OmegaConf.create({"backend": backend}))
    yield tq
    tq.close()
    ray.shutdown()

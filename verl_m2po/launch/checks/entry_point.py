"""Will the program that runs hand the config to verl's v1 trainer, which alone knows the trainer modes?

verl's own main does. Recipes and `verl.experimental` have mains with trainers of their own: they inherit
`trainer.use_v1=true` and every key of `trainer.v1` from verl's config, and read none of them.
"""

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal

from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.verl_config import TRAINER_MODE, has_proximal_policy, read
from verl_m2po.losses import requirements
from verl_m2po.staleness.config import is_chosen

VERLS_MAIN = "verl.trainer.main_ppo"
STARTS_V1 = {"TaskRunnerV1", "get_trainer_cls"}
"""What a main names that runs the v1 trainer: verl's run_ppo has to be told who runs the job."""

OWN_TRAINER = ("Trainer", "TaskRunner")
"""How the names of what a main runs instead end."""

ASYNCHRONOUS = ("one_step_off_policy", "fully_async_policy")
"""Packages whose trainers generate with earlier weights than they train, by design."""

Trainer = Literal["v1", "own", "unknown"]


def problems(config: DictConfig, main: Callable[..., Any] | None) -> Iterator[Problem]:
    """Yield what the program that runs will not do although the config says it.

    Args:
        main: the function that Hydra calls with the config; None: unknown.
    """
    if main is None:
        return
    module = module_of(main)
    name, trainer = name_of(module), trainer_of(module)
    if trainer == "own":
        yield from _ignored_mode(config, name)
        yield from _hidden_age(config, name)
    elif trainer == "unknown" and is_chosen(config):
        yield Problem(
            TRAINER_MODE,
            read(config, TRAINER_MODE),
            f"{name} does not name verl's v1 trainer, which alone knows this mode",
            f"Run `python -m {VERLS_MAIN}` if its trainer is another one",
            is_fatal=False,
        )


def _ignored_mode(config: DictConfig, name: str) -> Iterator[Problem]:
    if is_chosen(config):
        mode = read(config, TRAINER_MODE)
        why = f"{name} has a trainer of its own, which never reads trainer.v1: mode and staleness would be ignored"
        yield Problem(TRAINER_MODE, mode, why, f"Run `python -m {VERLS_MAIN}`, or leave the mode out")


def _hidden_age(config: DictConfig, name: str) -> Iterator[Problem]:
    """By what the trainer does: it is asynchronous whatever `trainer.v1.trainer_mode` says."""
    if not any(package in name.split(".") for package in ASYNCHRONOUS):
        return
    loss = requirements.loss_name(config)
    in_bypass = bool(read(config, requirements.BYPASS))
    if requirements.names_a_method(config) and not in_bypass and not has_proximal_policy(config):
        why = (
            f"the loss {loss} takes its ratio to the behaviour policy, but {name} trains on rollouts of earlier "
            "weights and recomputes old_log_probs with its own: the age of the data disappears from the ratio"
        )
        yield Problem(requirements.BYPASS, read(config, requirements.BYPASS), why, f"Set {requirements.BYPASS}=true")


def module_of(main: Callable[..., Any]) -> ModuleType | None:
    """The module that defines `main`."""
    return sys.modules.get(inspect.unwrap(main).__module__)


def name_of(module: ModuleType | None) -> str:
    """The name of `module` as it is imported: of the one that runs as a program, not `__main__`."""
    if module is None:
        return "this program"
    spec = getattr(module, "__spec__", None)
    return spec.name if spec is not None else getattr(module, "__file__", module.__name__)


def trainer_of(module: ModuleType | None) -> Trainer:
    """Which trainer the main in `module` starts, as far as its source says."""
    if module is None:
        return "unknown"
    if name_of(module) == VERLS_MAIN:
        return "v1"
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError, SyntaxError):
        return "unknown"
    names = set(_names(tree))
    if names & STARTS_V1 or {VERLS_MAIN, f"{VERLS_MAIN}.main"} & set(_imports(tree)):
        return "v1"
    return "own" if any(name.endswith(OWN_TRAINER) for name in names) else "unknown"


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.alias(name=name) | ast.ClassDef(name=name):
                yield name.rpartition(".")[2]


def _imports(tree: ast.AST) -> Iterator[str]:
    """The full names of what is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)

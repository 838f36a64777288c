"""Can the tools of verl's tool agent loop be loaded? verl asks in its workers, when everything has started."""

import ast
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from verl_m2po.ground.problem import Problem
from verl_m2po.ground.settings import Text
from verl_m2po.launch.checks.model import is_remote

_MULTI_TURN = "actor_rollout_ref.rollout.multi_turn"
CONFIG = Text(f"{_MULTI_TURN}.tool_config_path", "a YAML file of tools", may_be_null=True)
FUNCTIONS = Text(f"{_MULTI_TURN}.function_tool_path", "a Python file of tools", may_be_null=True)
_REMEDY = "See docs/start/agentic_rl of verl for the format, or set it to null"


def config(config: DictConfig) -> Iterator[Problem]:
    """Yield a file of tools that is not there, is no YAML, or describes no tools."""
    text = yield from _text(config, CONFIG)
    if text is None:
        return
    try:
        why = _flaw(yaml.safe_load(text))
    except yaml.YAMLError as error:
        why = f"it is no YAML ({' '.join(str(error).split())})"
    if why is not None:
        yield Problem(CONFIG.key, CONFIG.of(config), why, _REMEDY)


def functions(config: DictConfig) -> Iterator[Problem]:
    """Yield a file of tool functions that is not there or is no Python."""
    text = yield from _text(config, FUNCTIONS)
    if text is None:
        return
    try:
        ast.parse(text)
    except (SyntaxError, ValueError) as error:
        yield Problem(
            FUNCTIONS.key, FUNCTIONS.of(config), f"it is no Python ({error})", "Correct it, or set it to null"
        )


def _text(config: DictConfig, setting: Text) -> Generator[Problem, None, str | None]:
    """Yield why the file of `setting` cannot be read; return its text, None where there is none."""
    path = setting.of(config)
    if path is None or is_remote(path):
        return None
    try:
        return Path(path).expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        yield Problem(setting.key, path, f"it cannot be read ({reason})", f"Name {setting.meaning}, or set it to null")
    return None


def _flaw(described: Any) -> str | None:
    """What keeps a parsed file from describing tools, as verl's `initialize_tools_from_config` reads it."""
    tools = described.get("tools") if isinstance(described, dict) else None
    if not isinstance(tools, list) or not tools:
        return "it has no list `tools`"
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, dict) or not isinstance(tool.get("class_name"), str) or "." not in tool["class_name"]:
            return f"tool {number} has no class_name of the form module.Class"
        settings = tool.get("config")
        if not isinstance(settings, dict) or settings.get("type") != "native":
            return f"tool {number} ({tool['class_name']}) has no config.type=native, the only one that verl knows"
    return None

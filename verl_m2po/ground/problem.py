"""One reason why a run cannot do what its config says."""

from typing import Any, NamedTuple


class Problem(NamedTuple):
    """A setting, or a thing of the machine, that makes a run impossible or not what it says it is.

    Args:
        key: Full name of the setting as on Hydra's command line, or the thing that is wrong.
        value: What it was.
        why: What would happen, in one clause.
        remedy: What to do, as an imperative. Empty where `why` is a whole message that names key, value and remedy.
        is_fatal: Whether the run must not start; otherwise it is worth a warning.
    """

    key: str
    value: Any
    why: str
    remedy: str
    is_fatal: bool = True

    def __str__(self) -> str:
        if not self.remedy:
            return self.why
        return f"{self.key}={self.value}: {self.why}. {self.remedy}."


class WrongValue(ValueError):
    """A setting cannot be read as what it is; says so as a problem.

    Args:
        problem: What is wrong with it.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem

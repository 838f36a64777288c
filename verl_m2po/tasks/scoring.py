"""verl's own scorers behind one function, math-verify among them.

verl's ``default_compute_score`` reaches every scorer of verl but math-verify's, which no ``data_source`` of 0.9.1 leads
to and whose arguments differ from those of a custom reward function. Rows whose data source starts with
`MATH_VERIFY` need ``reward.custom_reward_function.path=pkg://verl_m2po.tasks.scoring``; all others score the same with
and without it.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MATH_VERIFY = "math_verify/"
# Starting verl's checkers imports verl in each of them, which can take longer than verl waits for one answer.
START_TIMEOUT_S = 300.0
# math-verify gives up on an answer after 5 s, and the first one in a fresh process pays for importing its parsers: on a
# busy machine a right answer then scores 0.
START_ANSWERS = 16
ATTEMPTS = 3

_start_lock = threading.Lock()
_started = False


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float | dict:
    """verl's score of a response: math-verify's for ``math_verify/...``, else that of ``default_compute_score``.

    Args:
        data_source: Column of that name; chooses the scorer.
        solution_str: The decoded response, special tokens removed.
        ground_truth: The right answer, without ``\\boxed{}``.
        extra_info: Passed on to verl.

    Raises:
        NotImplementedError: verl has no scorer for `data_source`.
        RuntimeError: math-verify is needed and does not work here.
    """
    start(data_source)
    if data_source.startswith(MATH_VERIFY):
        from verl.utils.reward_score import math_verify

        return math_verify.compute_score(solution_str, ground_truth)
    from verl.utils.reward_score import default_compute_score

    return default_compute_score(data_source, solution_str, ground_truth, extra_info)


def is_right(data_source: str, solution_str: str, ground_truth: str) -> bool:
    """Whether verl gives the response the full score, 1, in one of a few attempts; see `compute_score`.

    verl's scores of 0 for a checker that timed out and for a wrong answer look the same.
    """
    attempts = ATTEMPTS if data_source.startswith(MATH_VERIFY) else 1
    for _ in range(attempts):
        score = compute_score(data_source, solution_str, ground_truth)
        if float(score["score"] if isinstance(score, dict) else score) == 1.0:
            return True
    return False


def start(data_source: str) -> None:
    """Start the processes that the scorer of `data_source` works in, once, so that the first answers do not time out.

    Raises:
        RuntimeError: math-verify is needed and does not work here. verl itself would give every answer 0.
    """
    global _started
    if _started or not data_source.startswith(MATH_VERIFY):
        return
    with _start_lock:
        if not _started:
            _start_math_verify(data_source)
            _started = True


def _start_math_verify(data_source: str) -> None:
    from verl.utils.reward_score import math_verify

    def check(_: int) -> float:
        return math_verify.compute_score("$\\boxed{\\frac{1}{2}}$", "\\frac{1}{2}", timeout=START_TIMEOUT_S)

    with ThreadPoolExecutor(START_ANSWERS) as pool:
        scores = list(pool.map(check, range(START_ANSWERS)))
    if max(scores) != 1.0:
        raise RuntimeError(f"{data_source} is scored by math-verify, which does not work here: pip install math-verify")

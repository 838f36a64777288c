"""Noticing that a process of the run has died, whatever the trainer waits for at that moment.

verl, TransferQueue and the weight transfer wait without a limit for a peer that no longer exists. So a thread of the
trainer keeps one question open to every actor of the run. Ray fails the question of a dead one, and the run ends with
an error that names it.
"""

import asyncio
import http.client
import logging
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from types import FrameType
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError

logger = logging.getLogger(__name__)

ASK_EVERY_S = 5.0

UNWIND_S = 10.0
"""How long the trainer has to fail by itself, which says more, before it is interrupted."""

FIND_CAUSE_S = 5.0
"""How long after an error of the trainer the dead are looked for: Ray learns of a death a moment after it."""

MACHINE_DEATH_S = 60.0
"""How long Ray may take to learn that a machine is gone. Until then actors there are unavailable, or do not answer."""

ASK_AGAIN_S = 1.0
"""Between two questions to an actor that Ray calls unavailable."""

EXIT_S = 30.0
"""How long the trainer has to clean up after a death before its process ends regardless."""

HEALTH_S = 1.0
"""How long a rollout server may take to say whether its engine lives; one that is busy is asked again."""

INTERRUPT = signal.SIGUSR1
"""Sent by the watching thread to its own process, to reach the main thread inside a system call."""


class WorkerDied(RuntimeError):
    """A process of the run is gone or does not answer, and the run with it."""


def is_dead_engine(error: BaseException) -> bool:
    """Whether a rollout server says that its engine is gone. By the name of vLLM's error: vLLM need not be there."""
    return "EngineDeadError" in {each.__name__ for each in type(error).__mro__}


class ServerDied(RuntimeError):
    """Rollout servers died under a request until it was given up; see `rollout/client.py`."""


class RunActors:
    """The actors without which the run cannot go on, told from a user's own.

    Args:
        actors: handles.
    """

    def __init__(self, actors: Iterable[Any] = ()) -> None:
        self._actors = {actor._actor_id.hex(): actor for actor in actors}

    def is_death(self, error: BaseException) -> bool:
        """Whether the error of a remote call says that one of them, or the engine behind a rollout server, is gone.

        A dead actor of which Ray does not say which it was counts as one of them. Ray raises an error of the other side
        as a class that inherits from the original one's. vLLM's is told by its name, since vLLM need not be there.
        """
        if isinstance(error, ActorDiedError):
            return error.actor_id is None or error.actor_id in self._actors
        return isinstance(error, ServerDied) or is_dead_engine(error)

    async def settle(self, error: BaseException) -> BaseException:
        """The death that `error` turns out to be, if it says that one of them is unavailable; else `error`.

        Ray calls an actor unavailable while it does not know yet whether it is dead.
        """
        if not isinstance(error, ActorUnavailableError) or error.actor_id not in self._actors:
            return error
        deadline = time.monotonic() + MACHINE_DEATH_S
        while (left_s := deadline - time.monotonic()) > 0:
            try:
                await asyncio.wait_for(self._actors[error.actor_id].__ray_ready__.remote(), left_s)
                break
            except ActorDiedError as death:
                return death
            except ActorUnavailableError:
                await asyncio.sleep(ASK_AGAIN_S)
            except asyncio.TimeoutError:
                break
        return error  # for all that is known, it lives


# Servers of the cluster are never behind a proxy.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


def _is_engine_dead(address: str) -> bool:
    """Whether the server at `address` says that its engine is gone. Silence says nothing: its actor is asked too."""
    try:
        with _open(f"http://{address}/health", timeout=HEALTH_S):
            return False
    except urllib.error.HTTPError as error:
        return error.code == HTTPStatus.SERVICE_UNAVAILABLE
    except (OSError, http.client.HTTPException):  # the latter from a port that does not speak HTTP
        return False


def _nothing(_actor: Any) -> None:
    """What an actor is asked to do to show that it does anything: `__ray_ready__` has a thread of its own."""


class Watch:
    """Watches actors, and ends what the main thread does when one of them dies.

    Args:
        ask_every_s: seconds between two questions to the same actor.
        unwind_s: see `UNWIND_S`.
        exit_s: see `EXIT_S`; None never ends the process.
    """

    def __init__(
        self, ask_every_s: float = ASK_EVERY_S, unwind_s: float = UNWIND_S, exit_s: float | None = EXIT_S
    ) -> None:
        self._ask_every_s, self._unwind_s, self._exit_s = ask_every_s, unwind_s, exit_s
        self._names: dict[Any, str] = {}
        self._questions: dict[Any, Any] = {}
        self._engines: dict[str, str] = {}
        self._lock = threading.Lock()
        self._death: str | None = None
        self._standstill: Callable[[], str | None] = lambda: None
        self._healers: list[Callable[[Any, str], bool]] = []

    def add(self, name: str, actors: Sequence[Any]) -> None:
        """Watch `actors`, too. The first name of an actor counts.

        Args:
            name: what they are, in the user's words, singular.
            actors: handles.
        """
        with self._lock:
            for index, actor in enumerate(actors):
                self._names.setdefault(actor, name if len(actors) == 1 else f"{name} {index} of {len(actors)}")

    def add_engines(self, name: str, addresses: Sequence[str]) -> None:
        """Watch the inference engines behind these servers: processes of their own, whose actors outlive them.

        Args:
            name: what they are, in the user's words, singular.
            addresses: "host:port" of servers that answer `/health`, as those of vLLM and SGLang do.
        """
        with self._lock:
            self._engines |= {address: f"{name} at {address}" for address in addresses}

    def drop_engine(self, address: str) -> None:
        """Watch the engine behind the server at `address` no more: its port may be another's before long."""
        with self._lock:
            self._engines.pop(address, None)

    def end_at(self, standstill: Callable[[], str | None]) -> None:
        """End the run, too, when `standstill` says that nothing moves any more."""
        self._standstill = standstill

    def heal_with(self, heal: Callable[[Any, str], bool]) -> None:
        """Let `heal` take care of who dies. It is told the actor, or an engine's address, and why, from any thread.

        Where it returns True the run goes on, and the dead is watched no more.
        """
        self._healers.append(heal)

    def actors(self) -> list[Any]:
        """Handles of all that are watched."""
        with self._lock:
            return list(self._names)

    def find_dead(self, timeout_s: float) -> str | None:
        """Ask everybody.

        Returns:
            Who died, with Ray's reason; None if nobody is known to be dead after `timeout_s` seconds, or all that are
            have been taken care of.
        """
        return self._look(timeout_s)[0]

    def _look(self, timeout_s: float) -> tuple[str | None, bool]:
        """See `find_dead`; and whether some are unavailable, dead or not: the next question will tell."""
        with self._lock:
            for actor in self._names.keys() - self._questions.values():
                self._questions[actor.__ray_ready__.remote()] = actor
            questions, engines = dict(self._questions), dict(self._engines)
        some_unavailable = False
        for question in (
            ray.wait(list(questions), num_returns=len(questions), timeout=timeout_s)[0] if questions else ()
        ):
            with self._lock:
                self._questions.pop(question, None)
            try:
                ray.get(question)
            except ActorDiedError as error:
                if (death := self._death_of(self._names, questions[question], f" {error}")) is not None:
                    return death, some_unavailable
            except ActorUnavailableError:
                some_unavailable = True
        dead = [address for address in engines if _is_engine_dead(address)]
        deaths = [self._death_of(self._engines, address) for address in dead]
        return next(filter(None, deaths), None), some_unavailable

    def _death_of(self, watched: dict[Any, str], key: Any, why: str = "") -> str | None:
        """What is said of the death of `key`, one of those `watched`; None if somebody takes care of it."""
        with self._lock:
            death = f"{watched[key]} died.{why}" if key in watched else None
        if death is None or not any(heal(key, death) for heal in self._healers):
            return death
        with self._lock:
            watched.pop(key, None)
        return None

    def find_silent(self, timeout_s: float) -> list[str]:
        """Names of those that do not answer within `timeout_s` seconds: blocked, busy or dead."""
        with self._lock:
            questions = {actor.__ray_call__.remote(_nothing): name for actor, name in self._names.items()}
        if not questions:
            return []
        _, unanswered = ray.wait(list(questions), num_returns=len(questions), timeout=timeout_s)
        return sorted(questions[question] for question in unanswered)

    def end(self, reason: str) -> None:
        """End what the main thread does inside `guard`. From another thread."""
        self._death = reason
        logger.error("%s", reason)
        self._limit_cleaning_up(reason)
        signal.pthread_kill(threading.main_thread().ident or 0, INTERRUPT)

    def _find_cause(self) -> str | None:
        """`find_dead`, as often as it takes actors that are unavailable to turn out dead or alive."""
        with self._lock:
            # Who answered before the error may be what has caused it.
            self._questions.clear()
        deadline = time.monotonic() + MACHINE_DEATH_S
        while time.monotonic() < deadline:
            death, some_unavailable = self._look(FIND_CAUSE_S)
            if death or self._death or not some_unavailable:
                return death or self._death
            time.sleep(0.1)
        return None

    def find_cause_until(self, is_healed: Callable[[], bool], error: BaseException) -> bool:
        """Look for who died, after `error`, until `is_healed`, which somebody who takes care of a death makes true.

        Returns:
            Whether it is; not if the dead cannot be taken care of, or nobody turns out dead.
        """
        limit_s = MACHINE_DEATH_S if isinstance(error, ActorUnavailableError) else FIND_CAUSE_S
        deadline = time.monotonic() + limit_s
        while not is_healed():
            if self.find_dead(min(limit_s, 1.0)) is not None or time.monotonic() > deadline:
                return is_healed()
        return True

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Run a block that cannot outlive what it depends on. In the main thread.

        Raises:
            WorkerDied: an actor died, and the block failed for that reason, or hung and was interrupted.
        """
        has_ended = threading.Event()
        before = signal.signal(INTERRUPT, self._interrupt)
        threading.Thread(target=self._watch, args=(has_ended,), name="liveness", daemon=True).start()
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if death := self._death or self._find_cause():
                self._limit_cleaning_up(death)
                raise WorkerDied(death) from error
            raise
        finally:
            has_ended.set()
            signal.signal(INTERRUPT, before)

    def _interrupt(self, _number: int, _frame: FrameType | None) -> None:
        # Inside ray.get any other exception of a signal handler is printed and forgotten.
        raise KeyboardInterrupt(self._death)

    def _watch(self, has_ended: threading.Event) -> None:
        death = None
        while death is None:
            if has_ended.wait(self._ask_every_s):
                return
            try:
                death = self.find_dead(timeout_s=0.5) or self._stands_still()
            except Exception:
                # Without this thread nothing would be watched, and nobody would know.
                logger.exception(
                    "a look at the processes of the run failed, the next one is in %g s", self._ask_every_s
                )
        self._death = death
        if not has_ended.wait(self._unwind_s):
            self.end(death)

    def _stands_still(self) -> str | None:
        reason = self._standstill()
        if reason is None:
            return None
        silent = self.find_silent(timeout_s=FIND_CAUSE_S)
        who = f"No answer from: {', '.join(silent)}" if silent else "Every process still answers"
        return f"{reason}. {who}"

    def _limit_cleaning_up(self, death: str) -> None:
        """End the process, if cleaning up after `death` waits for the dead as well."""

        def end() -> None:
            logger.critical("the trainer does not end by itself after this: %s", death)
            os._exit(1)

        if self._exit_s is not None:
            timer = threading.Timer(self._exit_s, end)
            timer.daemon = True
            timer.start()

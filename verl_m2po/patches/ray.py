"""Patches of Ray. Imports Ray only as they are applied."""

import functools
import sys
from collections.abc import Callable

from verl_m2po.patches.record import Patch, Scope


def after_init(hook: Callable[[], None]) -> None:
    """Call `hook` whenever Ray has been initialised in this process, until `no_longer_after_init`.

    Symptom: a SIGTERM ends the driver at once with a report of a crash; no checkpoint is saved.
    Cause: Ray's C++ side takes SIGTERM for itself during `ray.init`, behind Python's back, so the driver's handler has
    to be set again after that; the list of hooks for it is private (ray/_private/worker.py, 2.60, `_post_init_hooks`).
    Delete when: Ray leaves a handler of the driver alone, or has a public hook.

    Args:
        hook: Called in the thread that initialises Ray.
    """
    from ray._private import worker

    worker._post_init_hooks.append(hook)


def no_longer_after_init(hook: Callable[[], None]) -> None:
    """Undo `after_init`."""
    from ray._private import worker

    worker._post_init_hooks.remove(hook)


def give_daemons_a_session() -> None:
    """Keep a signal that is meant for the driver's process group away from Ray's daemons. Linux only.

    Symptom: after `timeout`, `kill -TERM -PGID` or a batch system's SIGTERM nothing can be saved: raylet and GCS are
    gone.
    Cause: Ray starts them in the driver's process group, and keeps only SIGINT from them (ray/_private/services.py,
    2.60, `start_ray_process`). They still die with the driver, by Linux's parent-death signal.
    Delete when: `ray.init` can start its daemons in a session of their own.
    """
    from ray._private import services

    if sys.platform.startswith("linux") and not isinstance(services.ConsolePopen, functools.partial):
        services.ConsolePopen = functools.partial(services.ConsolePopen, start_new_session=True)


PATCHES = (
    Patch(after_init, replaces="ray._private.worker._post_init_hooks", scope=Scope.STALENESS_DRIVER),
    Patch(give_daemons_a_session, replaces="ray._private.services.ConsolePopen", scope=Scope.STALENESS_DRIVER),
)

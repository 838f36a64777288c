"""Which processes a run of verl's depends on, under the names that an error says."""

from typing import Any

import ray

from verl_m2po.staleness.watch.liveness import Watch


def watch_storage(watch: Watch) -> None:
    """TransferQueue's, which verl starts before the trainer."""
    watch.add("TransferQueue controller", [ray.get_actor("TransferQueueController", "transfer_queue")])
    storage = [name for name in ray.util.list_named_actors() if name.startswith("TransferQueueStorageUnit")]
    watch.add("TransferQueue storage unit", [ray.get_actor(name) for name in sorted(storage)])


def watch_workers(watch: Watch, trainer: Any) -> None:
    """Those that `trainer`, a v1 trainer of verl's, has started by now."""
    managers = trainer._rollout_server_managers()
    replicas = [replica for manager in managers for replica in manager.get_replicas()]
    watch.add("actor worker", trainer.actor_rollout_wg.workers)
    watch.add("rollout server", [server for manager in managers for server in manager.server_handles])
    watch.add_engines("rollout engine", [address for manager in managers for address in manager.get_addresses()])
    watch.add("rollout worker", [worker for replica in replicas for worker in replica.workers])
    watch.add("rollout load balancer", [manager.global_load_balancer for manager in managers])
    watch.add("reward worker", trainer.get_reward_handles() or [])
    if (judge := trainer.reward_loop_manager.reward_model_manager) is not None:
        watch.add("reward model server", judge.server_handles)
    if (teachers := getattr(trainer, "teacher_model_manager", None)) is not None:
        watch.add("teacher server", [each for of in teachers.server_handles.values() for each in of])
        watch.add("teacher load balancer", list(teachers.load_balancer_handle.values()))
    if trainer.use_critic:
        watch.add("critic worker", trainer.critic_wg.workers)
    if trainer.use_reference_policy:
        watch.add("reference worker", trainer.ref_policy_wg.workers)

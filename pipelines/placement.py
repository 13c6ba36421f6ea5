"""Records a run's Ray placement group, so that it can be removed after Tune has ended the run.

Tune ends a trial's process, and with it Ray Train's controller and workers; their placement group
stays until the whole job ends. Ray Train has an actor that removes it, but that actor asks Ray's
dashboard, which a private local cluster doesn't have.
"""

from __future__ import annotations

from pipelines.storage import Store


def note(store: Store, run: str) -> None:
    """Record this worker's placement group; the first worker calls this."""
    import ray

    group = ray.util.get_current_placement_group()
    if group is not None:
        worker = ray.get_runtime_context().get_actor_id()
        store.write_json(f"{run}/placement.json", {"group": group.id.hex(), "worker": worker})


def held(store: Store, run: str) -> dict[str, str] | None:
    """The last placement group of a run's workers, and the first worker."""
    name = f"{run}/placement.json"
    return store.read_json(name) if store.exists(name) else None


def release(room: dict[str, str]) -> bool:
    """Remove the placement group of a run that was ended; False if its worker is still alive.

    Until the worker is dead, the controller may live, too, and would start other workers.
    """
    from ray._private.state import actors  # the public way asks the dashboard
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    worker = actors(room["worker"])
    if worker and worker["State"] != "DEAD":
        return False
    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(room["group"]))))
    return True

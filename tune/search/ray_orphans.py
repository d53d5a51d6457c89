"""TODO tune/search/ray_orphans.py."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

_TIDY_S = 2.0


@contextmanager
def _orphans_removed() -> Iterator[None]:
    """Give back what trainings of trials that ended in their middle still hold: Ray keeps it for the whole job.

    Their placement groups were made by controllers that are gone; nobody else would remove them.
    """
    done = threading.Event()

    def tidy() -> None:
        from ray._private.state import state
        from ray.core.generated import gcs_pb2
        from ray.util.placement_group import PlacementGroup, remove_placement_group

        nobody, removed = ray.ActorID.nil().binary(), gcs_pb2.PlacementGroupTableData.REMOVED
        while not done.wait(_TIDY_S):
            for data in state._connect_and_get_accessor().get_placement_group_table():
                group = gcs_pb2.PlacementGroupTableData.FromString(data)
                ours = group.creator_job_id == ray.get_runtime_context().job_id.binary()
                gone = ours and group.creator_actor_dead and group.creator_actor_id not in (b"", nobody)
                if gone and not group.is_detached and group.state != removed:
                    remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))

    thread = threading.Thread(target=tidy, daemon=True, name="orphans")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()

"""Frees what trainings of killed trials still hold; uses Ray's private API.

If a trial dies in the middle of a training, the placement group of the training's workers stays until the job ends
(ray-project/ray issues 53921 and 54305). Ray's own cleaner (pull request 58515) does not free it here: it asks the
State API, which only a dashboard serves, and sessions of this project run without one. Remove this file when that
cleaner works without a dashboard. The public table of placement groups does not say who made them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray

_PERIOD_S = 2.0


@contextmanager
def orphans_removed() -> Iterator[None]:
    """Remove placement groups of this job whose creator is dead, for the length of a ``with`` block."""
    done = threading.Event()
    thread = threading.Thread(target=_remove_orphans, args=(done,), daemon=True, name="orphans")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _remove_orphans(done: threading.Event) -> None:
    from ray._private.state import state
    from ray.core.generated import gcs_pb2
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job, nobody = ray.get_runtime_context().get_job_id(), ray.ActorID.nil().binary()
    while not done.wait(_PERIOD_S):
        for data in state._connect_and_get_accessor().get_placement_group_table():
            group = gcs_pb2.PlacementGroupTableData.FromString(data)
            has_dead_creator = group.creator_actor_dead and group.creator_actor_id not in (b"", nobody)
            is_kept = group.is_detached or group.state == gcs_pb2.PlacementGroupTableData.REMOVED
            if group.creator_job_id.hex() == job and has_dead_creator and not is_kept:
                remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))

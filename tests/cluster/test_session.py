"""Connecting to Ray and leaving it: what is still at work when a command is done must not take its end away."""

import subprocess
import sys

import pytest

LEAVE = """
import threading, time
import ray
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from cluster.session import connected

end = StreamingExecutor.shutdown

def end_slowly(self, *args, **kwargs):  # as on a machine with much to do
    if threading.current_thread() is not threading.main_thread():
        time.sleep(3.0)
    end(self, *args, **kwargs)

StreamingExecutor.shutdown = end_slowly
with connected(num_cpus=2):
    rows = iter(ray.data.range(64, override_num_blocks=64).map(lambda row: time.sleep(0.1) or row).iter_rows())
    next(rows)
    rows.close()
left = [thread.name for thread in threading.enumerate()]
assert not any(name.startswith(("iter_threaded", "StreamingExecutor")) for name in left), left
print("left in good order")
"""


@pytest.mark.slow
def test_what_reads_a_dataset_is_over_before_ray_is_left() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, "left in good order\n"), done.stderr
    assert "after it is shutdown" not in done.stderr

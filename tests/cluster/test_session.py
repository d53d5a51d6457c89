"""Leaving Ray: threads that still work when a command is done must not break its end."""

import subprocess
import sys

import pytest

LEAVE = """
import threading, time
import ray
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from cluster.session import connect

end = StreamingExecutor.shutdown

def end_slowly(self, *args, **kwargs):  # as on a machine with much to do
    if threading.current_thread() is not threading.main_thread():
        time.sleep(3.0)
    end(self, *args, **kwargs)

StreamingExecutor.shutdown = end_slowly
with connect(num_cpus=2):
    rows = iter(ray.data.range(64, override_num_blocks=64).map(lambda row: time.sleep(0.1) or row).iter_rows())
    next(rows)
    rows.close()
left = [thread.name for thread in threading.enumerate()]
assert not any(name.startswith(("iter_threaded", "StreamingExecutor")) for name in left), left
print("left in good order")
"""


@pytest.mark.slow
def test_threads_of_a_dataset_end_before_the_connection_does() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVE], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (0, "left in good order\n"), done.stderr
    assert "after it is shutdown" not in done.stderr

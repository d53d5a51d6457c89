"""The limit of a pass, decided for passes of which that is known."""

import pytest

from engine.passes.speed.limits import PassTimes, limit_of


def times(*, decode=0.0, separate=0.0, score=0.0, write=0.0, **more):
    step_s = {"decode": decode, "separate": separate, "assess": 0.0, "score": score, "write": write}
    return PassTimes(
        **{"step_s": step_s, "gpu_s": separate, "read_wait_s": 0, "write_wait_s": 0, "num_cpus": 16} | more
    )


def test_busy_gpus_limit_a_pass():
    """One GPU of 100 s, sixteen CPUs of 50 s each."""
    found = limit_of(times(separate=95, decode=400, write=400, num_gpus=1), wall_s=100)
    assert (found["limit"], found["gpu_busy_fraction"], found["cpu_busy_fraction"]) == ("GPUs", 0.95, 0.5)
    assert found["advice"] == "GPUs are busy 95% of the time; more of them make it faster"


def test_gpus_that_wait_for_cpus_need_more_of_them():
    """Sixteen CPUs keep two GPUs busy for 38 of 100 s: 40 would keep them busy for 95, 12 more for each."""
    work = times(separate=76, decode=1000, write=500, num_gpus=2)
    found = limit_of(work, wall_s=100)
    assert found["limit"] == "CPUs" and found["gpu_busy_fraction"] == pytest.approx(0.38)
    assert found["advice"] == "GPUs wait for CPUs 62% of the time, mostly for decoding; give 12 more CPUs for each GPU"
    assert limit_of(work)["limit"] == "CPUs"  # and the plan of the same work: it takes 1500 / 16 s
    assert limit_of(work)["gpu_busy_fraction"] == pytest.approx(38 / (1500 / 16))


def test_the_advice_is_what_makes_the_gpus_the_limit():
    work = times(separate=76, decode=1000, write=500, num_gpus=2)
    more = times(separate=76, decode=1000, write=500, num_gpus=2, num_cpus=16 + 2 * 12)
    assert (limit_of(work)["limit"], limit_of(more)["limit"]) == ("CPUs", "GPUs")


def test_without_gpus_the_separator_works_on_cpus():
    found = limit_of(times(decode=20, separate=30, score=10, num_cpus=2, threads=3), wall_s=85)
    assert (found["limit"], found["gpu_busy_fraction"]) == ("CPUs", None)
    assert found["cpu_busy_fraction"] == pytest.approx((20 + 3 * (30 + 10)) / (2 * 85))
    assert (
        found["advice"]
        == "CPUs are busy 82% of the time, mostly with separating; more of them, or a GPU, make it faster"
    )


@pytest.mark.parametrize(
    ("waits", "limit", "remedy"),
    [
        ({"decode": 2400, "read_wait_s": 2200, "write": 800, "write_wait_s": 400}, "reading", "bring the audio nearer"),
        ({"decode": 800, "read_wait_s": 400, "write": 2400, "write_wait_s": 2200}, "writing", "write to a nearer"),
    ],
)
def test_workers_that_wait_for_storage_are_not_busy_cpus(waits, limit, remedy):
    """3,200 s of two workers for each of sixteen CPUs in 100 s, of which 600 s are work."""
    found = limit_of(times(separate=30, num_gpus=1, **waits), wall_s=100)
    assert (found["limit"], found["cpu_busy_fraction"]) == (limit, 600 / 1600)
    assert found["advice"].startswith(f"workers wait for storage 81% of their time, mostly in {limit}; {remedy}")


def test_a_short_pass_is_limited_by_its_start():
    found = limit_of(times(separate=5, decode=5), wall_s=20, start_s=15)
    assert (found["limit"], found["advice"]) == ("start", "starting took 75% of the time, as in any short pass")
    later = limit_of(times(separate=800, decode=600), wall_s=120, start_s=20)  # does not count in a longer one
    assert (later["limit"], later["cpu_busy_fraction"]) == ("CPUs", 1400 / 1600)


@pytest.mark.parametrize("num_gpus", [0, 4])
def test_workers_without_work_wait_for_the_command(num_gpus):
    found = limit_of(times(separate=100, decode=200, num_gpus=num_gpus), wall_s=100)
    assert found["limit"] == "command" and "several commands (--slice)" in found["advice"]
    assert ("GPUs (25% busy) and CPUs (12% busy) wait" in found["advice"]) == bool(num_gpus)


def test_nothing_divides_by_zero():
    assert limit_of(times(), wall_s=0.0)["limit"] == "command" and limit_of(times())["cpu_busy_fraction"] == 0.0

"""Passes whose tasks run in this process instead of on Ray, and what they leave."""

import json

from engine.passes import run
from engine.passes.separate import Separate

TIMES = {"wall_s", "audio_s_per_s", "step_s", "step_fraction", "checksum", "limit", "read_wait_s", "write_wait_s"}
TIMES |= {f"{step}_s" for step in ("decode", "separate", "assess", "score", "write")}


class InThisProcess:
    """Runs the tasks of a pass in this process instead of on Ray; ``after`` is called when all tasks have ended."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(run, "_stream", self)
        monkeypatch.setattr(run, "choose_placement", lambda *_: None)
        monkeypatch.setattr(run.ray, "cluster_resources", lambda: {"CPU": 2.0})
        self.turns = []
        self.skip = set()
        self.decoded = self.after = lambda value: value

    def __call__(self, tasks, steps, progress):
        self.turns.append([task["task"] for task in tasks])
        separate = Separate(*steps.models, steps.config)
        with progress.shown():
            for task in (task for task in tasks if task["task"] not in self.skip):
                for shard in steps.decode.decode(**task):
                    progress.add(steps.write.write(separate.separate(self.decoded(shard))))
        self.after(len(self.turns))


def contents(out):
    """All files of a pass, without times."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file() and path.suffix != ".lock"):
        data = path.read_bytes()
        if path.suffix == ".json":
            data = {key: value for key, value in json.loads(data).items() if key not in TIMES}
        found[str(path.relative_to(out))] = data
    return found

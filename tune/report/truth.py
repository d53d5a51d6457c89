"""True SI-SDR of stems, where the true sources of a corpus are known, as those of the demo are."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch

from engine.audio.decoder import shared_decoder
from engine.passes.shards import read_audio
from engine.scoring.metrics import si_sdr_db
from engine.storage.paths import Location
from tune.report.collect import PassFacts
from tune.report.stems import Numbered, StemRow

_MOST_STEMS = 400  # of which a mean is computed; evenly drawn


@dataclass(frozen=True, kw_only=True)
class Truth:
    """A folder with true sources, ``CLIP/LABEL.flac``; CLIP is the name of a clip's file without its ending."""

    folder: Location

    def si_sdr_db(self, row: StemRow, stem_T: np.ndarray) -> float | None:
        """True SI-SDR of a stem; null if there is no source, or one of another length, as of a clip that was cut."""
        clip, label = PurePosixPath(row["path"]).stem, row["label"]
        if "/" in label or {clip, label} & {"", ".", ".."}:
            return None
        path = self.folder / clip / f"{label}.flac"
        if not path.is_file():
            return None
        source_T = shared_decoder().decode(str(path), sample_rate_hz=row["sample_rate_hz"])
        if not len(source_T) == len(stem_T) == row["num_samples"]:
            return None
        estimate, reference = (torch.from_numpy(np.array(one_T, np.float32)) for one_T in (stem_T, source_T))
        return float(si_sdr_db(estimate=estimate, reference=reference))

    def sentence(self, one: PassFacts) -> str:
        """The means over the kept and over the rejected stems of a pass in words; empty without any true source."""
        parts = []
        for is_kept, name in ((True, "kept stems" if one.stems.is_judged else "stems"), (False, "rejected stems")):
            found = self._measured(one, is_kept=is_kept)
            if found:
                parts.append(f"{np.mean(found):.1f} dB over {len(found):,} {name}")
        return f"True SI-SDR, mean: {', '.join(parts)}." if parts else ""

    def _measured(self, one: PassFacts, *, is_kept: bool) -> list[float]:
        kept, rejected = (sum(counts) for counts in zip((0, 0), *one.stems.by_label().values(), strict=True))
        number = kept if is_kept else rejected
        numbers = np.unique(np.linspace(0, number - 1, min(number, _MOST_STEMS)).astype(int))
        rows = one.stems.rows([Numbered(is_kept, int(number)) for number in numbers])
        values = []
        for shard, group in itertools.groupby(sorted(rows, key=lambda row: row["shard"]), lambda row: row["shard"]):
            some = list(group)
            audio = one.left_out.read(
                shard.removesuffix(".parquet"), read_audio, one.folder / "stems", shard, [row["row"] for row in some]
            )
            values += [self.si_sdr_db(row, stem_T) for row, stem_T in zip(some, audio or [], strict=False)]
        return [value for value in values if value is not None]

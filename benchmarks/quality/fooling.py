"""Whether the gate can be fooled: adversarial separators and the oracle on natural clips whose truth is known.

    python benchmarks/fooling.py --esc10 DIR [--out runs/quality] [--quick]

Seed, tagger and estimator are of fold 1, and so are the mixtures that the default gate was chosen on. A stem is
degenerate if its plain SNR against the true source is below 8 dB: what is right by accident (half of a mixture in which
the other is faint) is not. Writes `benchmarks/fooling.md` and the README's sentence.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile
import torch
from adversaries import ADVERSARIES, Case
from setting import Setting, prepare, say, stamp

from engine.cli.tables import fill
from engine.corpus.read import read_corpus
from engine.corpus.sources import read_sources
from engine.schema import SCORES, DecodedClip, SeparatedClip
from engine.scoring.metrics import si_sdr_db, snr_db
from engine.scoring.model_scores import Scorer
from engine.selection.filter import judge
from engine.selection.thresholds import Thresholds
from engine.separators import load
from engine.separators.batching import BatchedSeparator
from engine.storage.files import write_bytes
from engine.taggers import open_tagger

_HERE = Path(__file__).parent
_GOOD_DB = 8.0


def cases(work: Setting) -> list[tuple[dict[str, Any], Case]]:
    """Natural clips of two sources and what an adversary may use of other recordings."""
    rows = [row for row in read_corpus(work.natural()).clips.to_pylist() if len(row["labels"]) == 2]
    sources = read_sources(work.clips, folds=[2, 3]).to_pylist()
    found = []
    for number, row in enumerate(rows[: work.size.num_fooling]):
        rng = np.random.default_rng([7, number])
        truth = [torch.from_numpy(work.truth(row["path"], label)) for label in row["labels"]]
        others = []
        for label, source_T in zip(row["labels"], truth, strict=True):
            same = [one["path"] for one in sources if one["label"] == label]
            samples_T = soundfile.read(same[rng.integers(len(same))], dtype="float32")[0]
            other_T = torch.from_numpy(np.resize(samples_T[:: round(44100 / work.rate_hz)], len(source_T)))
            others.append(other_T * source_T.norm() / other_T.norm().clamp(min=1e-6))
        case = Case(truth_ST=torch.stack(truth), others_ST=torch.stack(others), sample_rate_hz=work.rate_hz, rng=rng)
        found.append((row, case))
    return found


def assess(
    work: Setting, name: str, some: list[tuple[dict[str, Any], Case]]
) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Scores and estimates of an adversary's stems, with their true SI-SDR and SNR."""
    batched = BatchedSeparator(separator=load(work.seed), batch_s=80.0)
    scorer = Scorer(batched=batched, tagger=open_tagger(work.tagger), reseparate=True)
    clips = []
    si_sdr, snr = [], []
    for row, case in some:
        stems_ST = ADVERSARIES[name](case).float()
        si_sdr.append(si_sdr_db(estimate=stems_ST, reference=case.truth_ST))
        snr.append(snr_db(estimate=stems_ST, reference=case.truth_ST))
        clip = DecodedClip(row=row, samples_T=case.mix_T.numpy())
        clips.append(SeparatedClip(clip=clip, labels=row["labels"], stems_ST=stems_ST.numpy().copy()))
    rows = [scores for clip in scorer.scores(clips) for scores in clip]
    table = pa.Table.from_pylist(rows, schema=SCORES)
    estimates = work.quality().estimate(table)
    labels = pa.array([label for row, _ in some for label in row["labels"]])
    for column in estimates.column_names:
        table = table.append_column(column, estimates[column])
    return table.append_column("label", labels), torch.cat(si_sdr).numpy(), torch.cat(snr).numpy()


def line(name: str, scores: pa.Table, gate: Thresholds, si_sdr: np.ndarray, snr: np.ndarray) -> dict[str, Any]:
    """One row of the table."""
    verdict = judge(scores, gate)
    kept = verdict["kept"].to_numpy()
    clearsep = judge(scores, Thresholds(min_re_sdr_db=10.0))["kept"].to_numpy()
    bad = snr < _GOOD_DB
    rules = verdict["rejected_by"].drop_null().value_counts().to_pylist()
    return {
        "name": name,
        "si_sdr": float(np.median(si_sdr)),
        "scores": {column: float(np.nanmedian(np.asarray(scores[column], np.float64))) for column in _SHOWN},
        "num_bad": int(bad.sum()),
        "num_bad_kept": int((bad & kept).sum()),
        "num_bad_clearsep": int((bad & clearsep).sum()),
        "num_good": int((~bad).sum()),
        "num_good_kept": int((~bad & kept).sum()),
        "rules": ", ".join(
            f"{one['values']} {one['counts']}" for one in sorted(rules, key=lambda one: -one["counts"])[:3]
        ),
    }


_SHOWN = {
    "re_sdr_db": "Re-SDR",
    "remix_snr_db": "remix SNR",
    "mask_snr_db": "mask SNR",
    "contested_db": "contested",
    "rival_leak_db": "rival leak",
    "cycle_si_sdr_db": "cycle",
    "tagger_margin_db": "tagger margin",
    "estimated_si_sdr_db": "estimate",
}


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["stems", "true SI-SDR", *_SHOWN.values(), "degenerate: rejected (ClearSep 10 dB)", "good: kept", "by"]
    text = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for one in lines:
        bad, good = one["num_bad"], one["num_good"]
        rejected = f"{bad - one['num_bad_kept']} of {bad} ({bad - one['num_bad_clearsep']})" if bad else ""
        cells = [one["name"], f"{one['si_sdr']:.1f}", *(f"{value:.1f}" for value in one["scores"].values())]
        text.append(
            "| "
            + " | ".join([*cells, rejected, f"{one['num_good_kept']} of {good}" if good else "", one["rules"]])
            + " |"
        )
    return "\n".join(text)


def summary(lines: list[dict[str, Any]]) -> str:
    """The two goals in a sentence."""
    bad, bad_kept, clearsep = (
        sum(one[key] for one in lines) for key in ("num_bad", "num_bad_kept", "num_bad_clearsep")
    )
    oracle = lines[0]
    return (
        f"Of {bad} degenerate stems the default gate rejects {1 - bad_kept / bad:.1%}, ClearSep's (Re-SDR of 10 dB) "
        f"{1 - clearsep / bad:.1%}; of the oracle's stems it keeps {oracle['num_good_kept'] / oracle['num_good']:.1%}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Setting.arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = Setting.of(arguments)
    prepare(work)
    some = cases(work)
    lines = []
    for name in ADVERSARIES:
        lines.append(line(name, *(assessed := assess(work, name, some))[:1], work.gate, *assessed[1:]))
        say(f"{name}: {lines[-1]}")
    about = f"Medians over the stems of {len(some)} natural clips of two sources (folds 2 and 3), dB. {stamp()}"
    text = f"{summary(lines)}\n\n{table(lines)}\n\n{about}"
    if not arguments.quick:
        write_bytes(_HERE / "fooling.md", f"# Fooling the gate\n\n{text}\n".encode())
        fill(_HERE.parent / "README.md", "fooling", summary(lines))


if __name__ == "__main__":
    main()

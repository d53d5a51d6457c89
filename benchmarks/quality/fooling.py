"""How hard the default thresholds are to fool: adversarial stems and the oracle's, on clips whose truth is known.

    python -m benchmarks.quality.fooling --esc10 DIR [--out runs/quality] [--quick]

Seed, tagger and estimator are trained on fold 1, and the limits of the default thresholds were chosen on it; the clips
are of folds 2 and 3. A stem is degenerate if its plain SNR against the true source is below 8 dB, so that stems which
are right by accident (half of a mixture in which the other source is faint) do not count. Writes ``fooling.md`` and a
sentence of README.md and docs/results.md.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile
import torch

from benchmarks import pages
from benchmarks.quality.adversaries import ADVERSARIES, Case
from benchmarks.setting import Setting, prepare
from engine.corpus.read import read_corpus
from engine.schema import SCORES, ClipRow, DecodedClip, SeparatedClip
from engine.scoring.metrics import si_sdr_db, snr_db
from engine.scoring.model_scores import Scorer
from engine.selection.filter import judge
from engine.selection.thresholds import Thresholds
from engine.separators import load
from engine.separators.batching import BatchedSeparator
from engine.taggers import find_tagger

_PAGE = Path(__file__).with_name("fooling.md")
_GOOD_DB = 8.0
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


def draw_cases(work: Setting) -> list[tuple[ClipRow, Case]]:
    """Natural clips of two sources, with other recordings of the same labels for the adversaries."""
    rows: list[ClipRow] = [row for row in read_corpus(work.natural()).clips.to_pylist() if len(row["labels"]) == 2]
    sources = work.sources(2, 3).table.to_pylist()
    cases = []
    for number, row in enumerate(rows[: work.size.num_adversarial]):
        rng = np.random.default_rng([7, number])
        truth = [torch.from_numpy(work.truth(row["path"], label)) for label in row["labels"]]
        others = []
        for label, source_T in zip(row["labels"], truth, strict=True):
            same = [one["path"] for one in sources if one["label"] == label]
            samples_T = soundfile.read(same[rng.integers(len(same))], dtype="float32")[0]
            other_T = torch.from_numpy(np.resize(samples_T[:: round(44100 / work.rate_hz)], len(source_T)))
            others.append(other_T * source_T.norm() / other_T.norm().clamp(min=1e-6))
        case = Case(truth_ST=torch.stack(truth), others_ST=torch.stack(others), sample_rate_hz=work.rate_hz, rng=rng)
        cases.append((row, case))
    return cases


@dataclass(frozen=True, kw_only=True)
class Stems:
    """Stems of an adversary."""

    scores: pa.Table
    """Scores, estimates and labels."""
    si_sdr_N: np.ndarray
    """True SI-SDR."""
    snr_N: np.ndarray
    """True SNR."""


def score_adversary(work: Setting, name: str, cases: list[tuple[ClipRow, Case]]) -> Stems:
    """The stems of an adversary, scored and compared with the truth."""
    batched = BatchedSeparator(separator=load(work.seed), batch_s=80.0)
    scorer = Scorer(batched=batched, tagger=find_tagger(work.tagger).open(), reseparate=True)
    clips, si_sdr, snr = [], [], []
    for row, case in cases:
        stems_ST = ADVERSARIES[name](case).float()
        si_sdr.append(si_sdr_db(estimate=stems_ST, reference=case.truth_ST))
        snr.append(snr_db(estimate=stems_ST, reference=case.truth_ST))
        clip = DecodedClip(row=row, samples_T=case.mix_T.numpy())
        clips.append(SeparatedClip(clip=clip, labels=row["labels"], mixture_T=case.mix_T, stems_ST=stems_ST))
    table = pa.Table.from_pylist([scores for clip in scorer.scores(clips) for scores in clip], schema=SCORES)
    estimates = work.estimator().estimate(table)
    for column in estimates.column_names:
        table = table.append_column(column, estimates[column])
    labels = pa.array([label for row, _ in cases for label in row["labels"]])
    table = table.append_column("label", labels)
    return Stems(scores=table, si_sdr_N=torch.cat(si_sdr).numpy(), snr_N=torch.cat(snr).numpy())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the thresholds make of an adversary's stems."""

    name: str
    num_bad: int
    num_bad_kept: int
    num_bad_clearsep: int
    num_good: int
    num_good_kept: int
    cells: list[str]
    """Row of the table."""


def outcome(name: str, stems: Stems, thresholds: Thresholds) -> Outcome:
    """Apply the default thresholds and ClearSep's."""
    verdict = judge(stems.scores, thresholds)
    kept_N = verdict["kept"].to_numpy()
    clearsep_N = judge(stems.scores, Thresholds(min_re_sdr_db=10.0))["kept"].to_numpy()
    bad_N = stems.snr_N < _GOOD_DB
    bad, bad_kept, bad_clearsep = (int(count.sum()) for count in (bad_N, bad_N & kept_N, bad_N & clearsep_N))
    good, good_kept = int((~bad_N).sum()), int((~bad_N & kept_N).sum())
    rules = verdict["rejected_by"].drop_null().value_counts().to_pylist()
    first_rules = sorted(rules, key=lambda rule: -rule["counts"])[:3]
    medians = (float(np.nanmedian(np.asarray(stems.scores[column], np.float64))) for column in _SHOWN)
    cells = [
        name,
        f"{float(np.median(stems.si_sdr_N)):.1f}",
        *(f"{median:.1f}" for median in medians),
        f"{bad - bad_kept} of {bad} ({bad - bad_clearsep})" if bad else "",
        f"{good_kept} of {good}" if good else "",
        ", ".join(f"{rule['values']} {rule['counts']}" for rule in first_rules),
    ]
    return Outcome(
        name=name,
        num_bad=bad,
        num_bad_kept=bad_kept,
        num_bad_clearsep=bad_clearsep,
        num_good=good,
        num_good_kept=good_kept,
        cells=cells,
    )


def summary(outcomes: list[Outcome]) -> str:
    """Both goals in a sentence."""
    bad = sum(one.num_bad for one in outcomes)
    kept, clearsep = sum(one.num_bad_kept for one in outcomes), sum(one.num_bad_clearsep for one in outcomes)
    oracle = outcomes[0]
    return (
        f"Of {bad} degenerate stems the default thresholds reject {1 - kept / bad:.1%}, ClearSep's (Re-SDR of 10 dB) "
        f"{1 - clearsep / bad:.1%}; of the oracle's stems they keep {oracle.num_good_kept / oracle.num_good:.1%}."
    )


def main() -> None:
    """Command line."""
    parser = pages.parser(__doc__)
    Setting.add_arguments(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work = Setting.from_arguments(arguments)
    prepare(work)
    cases = draw_cases(work)
    outcomes = []
    for name in ADVERSARIES:
        outcomes.append(outcome(name, score_adversary(work, name, cases), work.thresholds))
        pages.log(" | ".join(outcomes[-1].cells))
    head = ["stems", "true SI-SDR", *_SHOWN.values(), "degenerate: rejected (ClearSep 10 dB)", "good: kept", "by"]
    table = pages.markdown(head, [one.cells for one in outcomes])
    about = f"Medians over the stems of {len(cases)} natural clips of two sources (folds 2 and 3), dB. {pages.stamp()}"
    if arguments.quick:
        print(summary(outcomes), table, about, sep="\n\n")
        return
    pages.write_page(_PAGE, "Adversarial stems", summary(outcomes), table, about)
    pages.fill(pages.RESULTS, "fooling", summary(outcomes))
    pages.fill(pages.README, "fooling", textwrap.fill(summary(outcomes), 100))


if __name__ == "__main__":
    main()

"""Thresholds: directions, limits, order of the rules, undefined scores; every stem kept or rejected with its reason."""

import itertools
from dataclasses import asdict, fields, replace

import numpy as np
import pyarrow as pa
import pytest

from engine.schema import ESTIMATES, SCORES
from engine.selection.filter import VERDICT, judge, require_scores
from engine.selection.thresholds import RULES, Quantile, Thresholds

NAN = float("nan")
SIGNS = {"min": 1, "max": -1}


def scores(**columns):
    """A table of SCORES and ESTIMATES, and labels where given; columns that are not given are null and pass."""
    num_rows = len(next(iter(columns.values())))
    schema = pa.schema([*SCORES, *ESTIMATES])
    table = pa.Table.from_pydict({name: columns.get(name, [None] * num_rows) for name in schema.names}, schema=schema)
    for name in ("label", "clip_id", "num_stems"):
        if name in columns:
            table = table.append_column(name, pa.array(columns[name]))
    return table


def kept(table, **rules):
    return judge(table, Thresholds(**rules))["kept"].to_pylist()


def test_min_rejects_what_is_below_and_max_what_is_above():
    table = scores(stem_level_db=[-31.0, -29.0, 2.0, 4.0])
    assert kept(table, min_stem_level_db=-30.0) == [False, True, True, True]
    assert kept(table, max_stem_level_db=3.0) == [True, True, True, False]
    assert kept(table, min_stem_level_db=-30.0, max_stem_level_db=3.0) == [False, True, True, False]


@pytest.mark.parametrize("limit", [-99.0, Quantile(quantile=0.1)])
def test_a_clip_that_is_too_short_for_re_sdr_fails_its_rule_and_no_other(limit):
    table = scores(re_sdr_db=[None, 20.0, 20.0], label=["a"] * 3, clip_id=["1", "2", "3"])
    verdict = judge(table, Thresholds(min_re_sdr_db=limit, label_floor_fraction=1.0, rank_by="re_sdr_db"))
    assert verdict["rejected_by"].to_pylist() == ["min_re_sdr_db", None, None]
    assert verdict["rejected_value"].to_pylist()[0] is None
    assert kept(table, min_re_si_sdr_db=10.0) == [True] * 3
    require_scores(table.slice(0, 1), Thresholds(min_re_sdr_db=10.0))


@pytest.mark.parametrize("limit", [10.0, 15.0, -30.0, 0.5])
def test_a_score_at_the_limit_passes(limit):
    table = scores(stem_level_db=[limit, np.nextafter(np.float32(limit), np.float32(-99)).item()])
    assert kept(table, min_stem_level_db=limit) == [True, False]
    table = scores(stem_level_db=[limit, np.nextafter(np.float32(limit), np.float32(99)).item()])
    assert kept(table, max_stem_level_db=limit) == [True, False]


@pytest.mark.parametrize("limit", [9.7, 0.1, -30.3])
def test_a_score_at_a_limit_that_float32_rounds_passes(limit):
    """A column stores 9.7 as float32, 9.69999981, which must not be rejected for being less than 9.7."""
    table = scores(stem_level_db=[limit])
    assert kept(table, min_stem_level_db=limit) == [True]
    assert kept(table, max_stem_level_db=limit) == [True]


def test_the_first_rule_that_fails_is_named_with_value_and_limit():
    table = scores(re_sdr_db=[12.0, 9.0, 12.0], stem_level_db=[-40.0, -40.0, -3.0], coherence_fraction=[0.1, 0.9, 0.75])
    verdict = judge(table, Thresholds(min_re_sdr_db=10.0, min_stem_level_db=-30.0, max_coherence_fraction=0.5))
    assert verdict.schema == VERDICT
    assert [tuple(row.values()) for row in verdict.to_pylist()] == [
        (False, "min_stem_level_db", -40.0, -30.0, False),
        (False, "min_re_sdr_db", 9.0, 10.0, False),
        (False, "max_coherence_fraction", 0.75, 0.5, False),
    ]


def test_a_kept_stem_has_no_reason():
    (row,) = judge(scores(re_sdr_db=[20.0]), Thresholds(min_re_sdr_db=10.0)).to_pylist()
    assert row == {
        "kept": True,
        "rejected_by": None,
        "rejected_value": None,
        "rejected_limit": None,
        "kept_by_floor": False,
    }


def test_an_undefined_score_passes():
    assert kept(scores(coherence_fraction=[None, 0.9]), max_coherence_fraction=0.5) == [True, False]


@pytest.mark.parametrize("rule", [{"min_re_sdr_db": 10.0}, {"max_coherence_fraction": 0.5}])
def test_a_score_that_is_not_a_number_never_passes_a_rule(rule):
    """NaN means that scoring failed: to reject the stem or to raise is right, to keep it is not."""
    table = scores(re_sdr_db=[NAN], coherence_fraction=[NAN])
    try:
        verdict = kept(table, **rule)
    except ValueError:
        return
    assert verdict == [False]


def test_no_rules_keep_everything():
    table = scores(re_sdr_db=[-100.0, 100.0, None], coherence_fraction=[1.0, None, 0.0])
    assert kept(table) == [True, True, True]


def test_no_stems():
    verdict = judge(SCORES.empty_table(), Thresholds(min_re_sdr_db=10.0, max_coherence_fraction=0.5))
    assert verdict.schema == VERDICT and len(verdict) == 0


def test_every_stem_is_kept_or_rejected_as_plain_python_would():
    rng = np.random.default_rng(0)
    columns = {
        name: [None if rng.random() < 0.1 else np.float32(v).item() for v in rng.normal(0, 10, 300)]
        for name in SCORES.names
    }
    table = scores(**columns)
    rules = {"min_re_sdr_db": -5.0, "min_remix_snr_db": -8.0, "max_stem_level_db": 6.0, "max_coherence_fraction": 9.5}
    chunked = pa.concat_tables([table.slice(0, 7), table.slice(7, 0), table.slice(7)])
    verdicts = judge(chunked, Thresholds(**rules)).to_pylist()
    assert len(verdicts) == 300
    for row, verdict in zip(table.to_pylist(), verdicts, strict=True):
        failed = [
            (rule, row[rule[4:]], limit)
            for rule, limit in rules.items()
            if (rule == "min_re_sdr_db" if row[rule[4:]] is None else (row[rule[4:]] - limit) * SIGNS[rule[:3]] < 0)
        ]
        assert verdict["kept"] == (not failed)
        expected = failed[0] if failed else (None, None, None)
        assert (verdict["rejected_by"], verdict["rejected_value"], verdict["rejected_limit"]) == expected
    assert {verdict["rejected_by"] for verdict in verdicts} == {None, *rules}


@pytest.mark.parametrize(
    ("rule", "limit"), itertools.product(["min_re_sdr_db", "max_coherence_fraction"], [NAN, float("inf")])
)
def test_a_limit_that_is_not_finite_raises(rule, limit):
    with pytest.raises(ValueError, match=f"{rule} must be finite, got {limit}; correct it"):
        Thresholds(**{rule: limit})


def test_every_rule_is_min_or_max_of_a_score_column():
    defaults = {"estimate_confidence": 0.5, "rank_by": "estimated_si_sdr_db"}
    for field in fields(Thresholds):
        assert field.default == defaults.get(field.name), field.name
        if field.name not in {
            *defaults,
            "label_floor_fraction",
            "label_cap_ratio",
            "event_from",
            "drop_label_below",
            "add_label_from",
        }:
            direction, _, column = field.name.partition("_")
            assert direction in ("min", "max") and column in [*SCORES.names, "estimated_si_sdr_db"], field.name
    assert set(RULES) == {name for name in asdict(Thresholds()) if name[:4] in ("min_", "max_")}
    assert {name[4:] for name in RULES} == {*SCORES.names, "estimated_si_sdr_db"}


def test_every_score_has_a_rule_that_can_reject_by_it():
    """Each rule alone: the worst value is rejected, the best kept."""
    for rule in RULES:
        worst, best = (-1.0, 1.0) if rule.startswith("min_") else (1.0, -1.0)
        assert kept(scores(**{rule[4:]: [worst, best]}), **{rule: 0.0}) == [False, True], rule


# Quantiles.


def why(table, **rules):
    """Reason, value and limit of every stem; None for one that is kept."""
    rows = judge(table, Thresholds(**rules)).to_pylist()
    return [None if row["kept"] else (row["rejected_by"], row["rejected_value"], row["rejected_limit"]) for row in rows]


@pytest.mark.parametrize(("quantile", "limit"), [(0.0, 1.0), (0.5, 4.0), (0.375, 3.0), (1.0, 16.0)])
def test_a_quantile_is_interpolated_between_the_scores(quantile, limit):
    """Of 1, 2, 4, 8, 16 the 0.375 quantile is half way from the second to the third."""
    values = [8.0, 1.0, 16.0, 4.0, 2.0]
    rule = {"min_remix_snr_db": Quantile(quantile=quantile)}
    assert why(scores(remix_snr_db=values), **rule) == [
        None if value >= limit else ("min_remix_snr_db", value, limit) for value in values
    ]
    values = [-value for value in values]
    rule = {"max_rival_leak_db": Quantile(quantile=1 - quantile)}
    assert why(scores(rival_leak_db=values), **rule) == [
        None if value <= -limit else ("max_rival_leak_db", value, -limit) for value in values
    ]


def test_a_quantile_counts_defined_scores_of_stems_that_pass_the_absolute_rules():
    """1, 3 and 5 count; the fourth is silent, the fifth has no score and passes, the sixth is NaN and fails."""
    table = scores(remix_snr_db=[1.0, 3.0, 5.0, 100.0, None, NAN], stem_level_db=[-1.0, -1.0, -1.0, -50.0, -1.0, -1.0])
    assert why(table, min_remix_snr_db=Quantile(quantile=0.5), min_stem_level_db=-20.0) == [
        ("min_remix_snr_db", 1.0, 3.0),
        None,
        None,
        ("min_stem_level_db", -50.0, -20.0),
        None,
        ("min_remix_snr_db", None, 3.0),
    ]


def test_quantiles_do_not_depend_on_each_other():
    table = scores(re_sdr_db=[1.0, 2.0, 3.0], remix_snr_db=[9.0, 1.0, 5.0])
    rules = {"min_re_sdr_db": Quantile(quantile=0.5), "min_remix_snr_db": Quantile(quantile=0.5)}
    assert why(table, **rules) == [("min_re_sdr_db", 1.0, 2.0), ("min_remix_snr_db", 1.0, 5.0), None]


def test_a_quantile_by_label_rejects_the_same_fraction_of_every_label():
    labels = ["easy", "hard", "easy", "hard", "easy", "Hard"]  # labels are compared without case
    table = scores(remix_snr_db=[20.0, 1.0, 10.0, 2.0, 30.0, 3.0], label=labels)
    assert why(table, min_remix_snr_db=Quantile(quantile=0.5, by_label=True)) == [
        None,
        ("min_remix_snr_db", 1.0, 2.0),
        ("min_remix_snr_db", 10.0, 20.0),
        None,
        None,
        None,
    ]
    assert kept(table, min_remix_snr_db=Quantile(quantile=0.5)) == [True, False, True, False, True, False]


def test_equal_scores_all_reach_their_quantile():
    assert kept(scores(remix_snr_db=[9.7] * 7), min_remix_snr_db=Quantile(quantile=0.3)) == [True] * 7


# Estimates.


def test_confidence_lowers_or_raises_the_estimate_by_its_error():
    """A Gaussian is above its mean minus 1.2816 deviations with probability 0.9."""
    table = scores(estimated_si_sdr_db=[10.0, 12.0, 13.0, 9.0], estimated_error_db=[0.0, 2.0, 2.0, 2.0])
    assert kept(table, min_estimated_si_sdr_db=10.0) == [True, True, True, False]
    verdict = judge(table, Thresholds(min_estimated_si_sdr_db=10.0, estimate_confidence=0.9)).to_pylist()
    assert [row["kept"] for row in verdict] == [True, False, True, False]
    assert verdict[1]["rejected_value"] == pytest.approx(12 - 1.281552 * 2, abs=1e-5)
    assert verdict[1]["rejected_limit"] == 10.0
    assert kept(table, min_estimated_si_sdr_db=10.0, estimate_confidence=0.1) == [True, True, True, True]


def test_a_quantile_of_the_estimate_is_that_of_its_lower_bound():
    table = scores(estimated_si_sdr_db=[10.0, 12.0, 11.0], estimated_error_db=[0.0, 4.0, 0.0])
    rule = {"min_estimated_si_sdr_db": Quantile(quantile=0.5)}
    assert kept(table, **rule) == [False, True, True]
    assert kept(table, **rule, estimate_confidence=0.9) == [True, False, True]


# Floor and cap.


def ranked(label, estimates, **columns):
    return {
        "label": [label] * len(estimates),
        "clip_id": [f"{label}{number}" for number in range(len(estimates))],
        "estimated_si_sdr_db": estimates,
        **columns,
    }


def together(*groups):
    names = {name for group in groups for name in group}
    return scores(
        **{name: [v for group in groups for v in group.get(name, [None] * len(group["label"]))] for name in names}
    )


def floored(table, **rules):
    return judge(table, Thresholds(**rules))["kept_by_floor"].to_pylist()


def test_the_floor_keeps_the_best_of_a_hard_label_and_adds_nothing_to_an_easy_one():
    table = together(ranked("easy", [12.0, 11.0, 9.0, 1.0]), ranked("hard", [1.0, 5.0, -3.0, 2.0, 3.0]))
    rules = {"min_estimated_si_sdr_db": 10.0, "label_floor_fraction": 0.4}
    assert kept(table, **rules) == [True, True, False, False, False, True, False, False, True]
    assert floored(table, **rules) == [False] * 5 + [True, False, False, True]
    assert kept(table, **rules | {"label_floor_fraction": 0.41}) == [
        *(True, True, False, False),
        *(False, True, False, True, True),
    ]
    assert kept(table, **rules | {"label_floor_fraction": 1.0}) == [True] * 9
    assert kept(table, **rules | {"label_floor_fraction": 0.0}) == [True, True] + [False] * 7


@pytest.mark.parametrize(("num", "fraction"), [(10, 0.3), (10, 0.7), (100, 0.29), (50, 0.14), (3, 1 / 3)])
def test_a_fraction_that_is_a_whole_number_of_stems_is_that_number(num, fraction):
    table = together(ranked("a", [float(n) for n in range(num)]))
    rules = {"min_estimated_si_sdr_db": 1000.0, "label_floor_fraction": fraction}
    assert sum(kept(table, **rules)) == round(num * fraction)


def test_the_floor_never_readmits_a_stem_that_fails_another_rule():
    """Too quiet, too loud, silent after an earlier rule, failing a rule on another score, with a NaN score."""
    table = together(
        ranked(
            "dog",
            [30.0, 30.0, 30.0, 30.0, 30.0, 1.0],
            stem_level_db=[-40.0, 20.0, -40.0, -3.0, -3.0, -3.0],
            re_sdr_db=[20.0, 20.0, 1.0, 1.0, NAN, 20.0],
        )
    )
    rules = {"min_re_sdr_db": 10.0, "min_stem_level_db": -20.0, "max_stem_level_db": 6.0, "label_floor_fraction": 1.0}
    rules |= {"min_estimated_si_sdr_db": 5.0}
    assert kept(table, **rules) == [False, False, False, False, False, True]
    assert floored(table, **rules) == [False, False, False, False, False, True]


def test_the_fraction_of_the_floor_is_of_stems_that_pass_the_other_rules():
    """Half of four stems that are loud enough, not of eight."""
    table = together(ranked("dog", [float(n) for n in range(8)], stem_level_db=[-3.0] * 4 + [-50.0] * 4))
    rules = {"min_estimated_si_sdr_db": 10.0, "min_stem_level_db": -20.0, "label_floor_fraction": 0.5}
    assert kept(table, **rules) == [False, False, True, True] + [False] * 4


def test_the_cap_rejects_the_worst_of_a_label_with_too_many_stems():
    """Kept 6, 2 and 2: the median is 2, twice that is 4. The value is the rank, the limit that of the last kept."""
    table = together(
        ranked("easy", [16.0, 11.0, 15.0, 12.0, 14.0, 13.0]), ranked("b", [1.0, 2.0]), ranked("c", [1.0, 2.0])
    )
    assert why(table, label_cap_ratio=2.0) == [
        *(None, ("label_cap_ratio", 11.0, 13.0), None, ("label_cap_ratio", 12.0, 13.0), None, None),
        *(None, None, None, None),
    ]
    assert kept(table, label_cap_ratio=3.0) == [True] * 10


def test_the_cap_counts_labels_that_keep_a_stem_after_the_floor():
    """Kept 4, 1 (by its floor), 0 (all silent): the median of 4 and 1 is 2.5."""
    table = together(
        ranked("easy", [14.0, 13.0, 12.0, 11.0], stem_level_db=[-3.0] * 4),
        ranked("hard", [1.0, 2.0], stem_level_db=[-3.0] * 2),
        ranked("gone", [30.0], stem_level_db=[-90.0]),
    )
    rules = {"min_estimated_si_sdr_db": 10.0, "min_stem_level_db": -20.0, "label_floor_fraction": 0.5}
    assert kept(table, **rules, label_cap_ratio=1.0) == [True, True, False, False, False, True, False]


def test_ties_are_broken_by_clip_and_undefined_ranks_go_first():
    table = scores(
        label=["a"] * 4 + ["b"] * 2,
        clip_id=["z", "y", "x", "w", "u", "v"],
        estimated_si_sdr_db=[5.0, 5.0, 5.0, None, 1.0, 1.0],
    )
    assert why(table, label_cap_ratio=1.0) == [None, None, None, ("label_cap_ratio", None, 5.0), None, None]
    fewer = table.take([0, 1, 2, 4])
    assert kept(fewer, label_cap_ratio=1.0) == [False, True, True, True]


def test_the_direction_of_a_rank_is_that_of_its_rule():
    table = scores(
        label=["a"] * 2 + ["b"], clip_id=["1", "2", "3"], rival_leak_db=[-30.0, -10.0, 0.0], re_sdr_db=[1.0, 2.0, 3.0]
    )
    assert kept(table, label_cap_ratio=1.0, rank_by="rival_leak_db") == [True, False, True]
    assert kept(table, label_cap_ratio=1.0, rank_by="re_sdr_db") == [False, True, True]


def random_pass(num_stems, seed):
    rng = np.random.default_rng(seed)
    columns = {name: rng.normal(0, 10, num_stems).tolist() for name in ("re_sdr_db", "stem_level_db", "rival_leak_db")}
    columns["estimated_si_sdr_db"] = [
        None if rng.random() < 0.1 else float(rng.integers(0, 12)) for _ in range(num_stems)
    ]
    columns["label"] = [str(label) for label in rng.choice(["a", "b", "c", "d"], num_stems, p=[0.7, 0.1, 0.1, 0.1])]
    return scores(**columns, clip_id=[f"clip{number:04d}" for number in range(num_stems)])


ADAPTIVE = Thresholds(
    min_re_sdr_db=Quantile(quantile=0.4),
    min_stem_level_db=-12.0,
    max_rival_leak_db=Quantile(quantile=0.7, by_label=True),
    min_estimated_si_sdr_db=6.0,
    label_floor_fraction=0.4,
    label_cap_ratio=1.5,
)


def test_no_verdict_depends_on_the_order_or_the_chunks():
    table = random_pass(500, seed=0)
    verdict = judge(table, ADAPTIVE)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(500)
        shuffled = table.take(order)
        pieces = pa.concat_tables(
            [
                piece.set_column(piece.column_names.index("label"), "label", piece["label"].dictionary_encode())
                for piece in (shuffled.slice(0, 1), shuffled.slice(1, 0), shuffled.slice(1, 300), shuffled.slice(301))
            ]
        )
        assert judge(pieces, ADAPTIVE).equals(verdict.take(order))


def test_floor_and_cap_hold_for_every_label():
    table, rules = random_pass(2000, seed=3), asdict(ADAPTIVE)
    verdict = judge(table, ADAPTIVE)
    labels, is_kept = np.asarray(table["label"]), np.asarray(verdict["kept"])
    others = replace(ADAPTIVE, min_estimated_si_sdr_db=None, label_floor_fraction=None, label_cap_ratio=None)
    able = np.asarray(judge(table, others)["kept"]) & np.asarray(table["estimated_si_sdr_db"].is_valid())
    counts = {label: int(is_kept[labels == label].sum()) for label in "abcd"}
    for label in "bcd":
        assert counts[label] >= 0.4 * able[labels == label].sum()
    assert counts["a"] <= rules["label_cap_ratio"] * np.median(sorted(counts.values())) * 1.2
    assert set(verdict["rejected_by"].to_pylist()) == {
        *(None, "min_re_sdr_db", "min_stem_level_db", "max_rival_leak_db", "min_estimated_si_sdr_db"),
        "label_cap_ratio",
    }
    assert not (np.asarray(verdict["kept_by_floor"]) & ~is_kept).any()
    assert verdict["rejected_by"].null_count == is_kept.sum()


def test_adaptive_rules_of_no_stems():
    empty = random_pass(3, seed=0).slice(0, 0)
    assert judge(empty, ADAPTIVE).schema == VERDICT
    require_scores(empty, ADAPTIVE)


# Invalid settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_re_sdr_db": "high"}, "min_re_sdr_db must be a number, got 'high'"),
        ({"min_stem_level_db": Quantile(quantile=0.5)}, "min_stem_level_db must be a number, got Quantile"),
        ({"estimate_confidence": 1.0}, "estimate_confidence must be below 1, got 1.0; choose one such as 0.5"),
        ({"estimate_confidence": 0}, "estimate_confidence must be above 0, got 0"),
        ({"label_floor_fraction": 1.5}, "label_floor_fraction must be at most 1, got 1.5"),
        ({"label_cap_ratio": 0.5}, "label_cap_ratio must be at least 1, got 0.5"),
        ({"label_cap_ratio": NAN}, "label_cap_ratio must be finite, got nan"),
        ({"rank_by": "loudness"}, "rank_by must be the name of a score, got 'loudness'; known: active_fraction, "),
    ],
)
def test_settings_out_of_range_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        Thresholds(**settings)


@pytest.mark.parametrize("quantile", [-0.1, 1.1, NAN, "half", None, True])
def test_a_quantile_is_a_fraction(quantile):
    with pytest.raises(ValueError, match=r"quantile must be (a number|at least 0|at most 1|finite), got "):
        Quantile(quantile=quantile)


def test_a_missing_column_is_an_error_with_a_remedy():
    few = pa.table({"re_sdr_db": pa.array([1.0], pa.float32())})
    with pytest.raises(ValueError, match=r"cannot apply min_estimated_si_sdr_db .*; give an estimator"):
        judge(few, Thresholds(min_estimated_si_sdr_db=3.0))
    with pytest.raises(ValueError, match=r"cannot apply by_label \(only the stems of a pass have label\)"):
        judge(few, Thresholds(min_re_sdr_db=Quantile(quantile=0.5, by_label=True)))
    with pytest.raises(ValueError, match=r"\(only the stems of a pass have label\)"):
        judge(few, Thresholds(label_cap_ratio=2.0, rank_by="re_sdr_db"))


def test_a_rule_without_any_score_in_the_pass_is_an_error_and_one_with_some_is_not():
    table = scores(cycle_si_sdr_db=[None, 3.0], coherence_fraction=[None, None], num_stems=[1, 1])
    require_scores(table, Thresholds(min_cycle_si_sdr_db=1.0, max_coherence_fraction=0.5))
    with pytest.raises(
        ValueError, match=r"cannot apply max_rival_leak_db \(no stem has rival_leak_db\); make the pass"
    ):
        require_scores(table, Thresholds(max_rival_leak_db=-5.0))
    table = scores(estimated_si_sdr_db=[1.0, 2.0])
    require_scores(table, Thresholds(min_estimated_si_sdr_db=1.0))
    with pytest.raises(ValueError, match=r"cannot apply estimate_confidence \(no stem has estimated_error_db\)"):
        require_scores(table, Thresholds(min_estimated_si_sdr_db=1.0, estimate_confidence=0.8))

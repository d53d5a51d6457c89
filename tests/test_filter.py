"""Thresholds: directions, limits, order of the rules, undefined scores; every stem kept or rejected with its reason."""

import itertools
from dataclasses import asdict, fields

import numpy as np
import pyarrow as pa
import pytest

from engine.filter import VERDICT, Thresholds, judge
from engine.schema import SCORES

NAN = float("nan")


def scores(**columns):
    """A table of SCORES; columns that are not given pass every rule because they are null."""
    num_rows = len(next(iter(columns.values())))
    return pa.Table.from_pydict({name: columns.get(name, [None] * num_rows) for name in SCORES.names}, schema=SCORES)


def kept(table, **rules):
    return judge(table, Thresholds(**rules))["kept"].to_pylist()


def test_min_rejects_what_is_below_and_max_what_is_above():
    table = scores(stem_level_db=[-31.0, -29.0, 2.0, 4.0])
    assert kept(table, min_stem_level_db=-30.0) == [False, True, True, True]
    assert kept(table, max_stem_level_db=3.0) == [True, True, True, False]
    assert kept(table, min_stem_level_db=-30.0, max_stem_level_db=3.0) == [False, True, True, False]


@pytest.mark.parametrize("limit", [10.0, 15.0, -30.0, 0.5])
def test_a_score_at_the_limit_passes(limit):
    table = scores(stem_level_db=[limit, np.nextafter(np.float32(limit), np.float32(-99)).item()])
    assert kept(table, min_stem_level_db=limit) == [True, False]
    table = scores(stem_level_db=[limit, np.nextafter(np.float32(limit), np.float32(99)).item()])
    assert kept(table, max_stem_level_db=limit) == [True, False]


@pytest.mark.parametrize("limit", [9.7, 0.1, -30.3])
def test_a_score_at_a_limit_that_is_no_round_binary_number_passes(limit):
    """A column holds 9.7 as float32; nobody can want it rejected because 9.69999981 is less than 9.7."""
    table = scores(stem_level_db=[limit])
    assert kept(table, min_stem_level_db=limit) == [True]
    assert kept(table, max_stem_level_db=limit) == [True]


def test_the_first_rule_that_fails_is_named_with_value_and_limit():
    table = scores(re_sdr_db=[12.0, 9.0, 12.0], stem_level_db=[-40.0, -40.0, -3.0], coherence_fraction=[0.1, 0.9, 0.75])
    verdict = judge(table, Thresholds(min_re_sdr_db=10.0, min_stem_level_db=-30.0, max_coherence_fraction=0.5))
    assert verdict.schema == VERDICT
    assert verdict.to_pylist() == [
        {"kept": False, "rejected_by": "min_stem_level_db", "rejected_value": -40.0, "rejected_limit": -30.0},
        {"kept": False, "rejected_by": "min_re_sdr_db", "rejected_value": 9.0, "rejected_limit": 10.0},
        {"kept": False, "rejected_by": "max_coherence_fraction", "rejected_value": 0.75, "rejected_limit": 0.5},
    ]


def test_a_kept_stem_has_no_reason():
    (row,) = judge(scores(re_sdr_db=[20.0]), Thresholds(min_re_sdr_db=10.0)).to_pylist()
    assert row == {"kept": True, "rejected_by": None, "rejected_value": None, "rejected_limit": None}


def test_an_undefined_score_passes():
    assert kept(scores(coherence_fraction=[None, 0.9]), max_coherence_fraction=0.5) == [True, False]


@pytest.mark.parametrize("rule", [{"min_re_sdr_db": 10.0}, {"max_coherence_fraction": 0.5}])
def test_a_score_that_is_not_a_number_never_passes_a_rule(rule):
    """A NaN says that scoring broke: to reject it or to raise are both right, a track is not."""
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
            if row[rule[4:]] is not None and (row[rule[4:]] < limit if rule[:3] == "min" else row[rule[4:]] > limit)
        ]
        assert verdict["kept"] == (not failed)
        expected = failed[0] if failed else (None, None, None)
        assert (verdict["rejected_by"], verdict["rejected_value"], verdict["rejected_limit"]) == expected
    assert {verdict["rejected_by"] for verdict in verdicts} == {None, *rules}


@pytest.mark.parametrize(
    ("rule", "limit"), itertools.product(["min_re_sdr_db", "max_coherence_fraction"], [NAN, float("inf")])
)
def test_a_limit_that_is_not_finite_raises(rule, limit):
    with pytest.raises(ValueError, match=f"{rule} is {limit}; give a finite number"):
        Thresholds(**{rule: limit})


def test_every_rule_is_min_or_max_of_a_score_column():
    for field in fields(Thresholds):
        direction, _, column = field.name.partition("_")
        assert direction in ("min", "max") and column in SCORES.names, field.name
        assert field.default is None, field.name


def test_every_score_has_a_rule_that_can_reject_by_it():
    """Each rule alone: the worst value is rejected, the best kept."""
    for rule in asdict(Thresholds()):
        worst, best = (-1.0, 1.0) if rule.startswith("min_") else (1.0, -1.0)
        assert kept(scores(**{rule[4:]: [worst, best]}), **{rule: 0.0}) == [False, True], rule

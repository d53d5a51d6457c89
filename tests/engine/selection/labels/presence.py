"""Presence models with known probabilities."""

from engine.taggers.presence import CLIP, EVIDENCE, REST, STEM, LogisticModel, Presence


def logistic(kind, bias=0.0, **weights):
    """Log odds = the bias and the sum of weight * value."""
    names = EVIDENCE[kind]
    return LogisticModel(
        names=names,
        mean=(0.0,) * len(names),
        deviation=(1.0,) * len(names),
        weight=tuple(weights.get(name, 0.0) for name in names),
        bias=bias,
        offsets={},
    )


BANDS = Presence(
    tagger="t",
    models={
        CLIP: logistic(CLIP, clip_tag_db=1.0),
        STEM: logistic(STEM, 25.0, stem_level_db=1.0),
        REST: logistic(REST, -20.0, residual_tag_db=1.0),
    },
    measured={"low": [], "high": [], "click": []},
)
"""For ``BandTagger``: a label sounds if its stem is above -25 dB, or if some of it is left over."""

"""Tensors by name and shape: what is missing, surplus or of another shape is listed."""

import pytest
import torch

from engine.separators.convert.keys import require_tensors

WANTED = {"a.weight": (2, 3), "b": (), "c.bias": (4,)}


def tensors(**changes):
    return {name: torch.zeros(shape) for name, shape in {**WANTED, **changes}.items() if shape is not None}


def require(given):
    return require_tensors(given, WANTED, ignored=lambda name: name.startswith("stft."), what="a bell checkpoint")


def test_wanted_tensors_come_in_their_order_without_those_that_are_ignored():
    given = {"stft.kernel": torch.zeros(9), **dict(reversed(tensors().items()))}
    assert list(require(given)) == list(WANTED)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"b": None}, "1 missing \\(b\\)"),
        ({"a.weight": (3, 2)}, "1 of another shape \\(a.weight 3x2, not 2x3\\)"),
        ({"b": (1,)}, "b 1, not scalar"),
        ({f"more.{n}": (1,) for n in range(5)}, "5 surplus \\(more.0, more.1, more.2, ...\\)"),
        ({"a.weight": None, "x\nred": (1,)}, "1 missing \\(a.weight\\); 1 surplus \\(x\\S+red\\)"),
    ],
)
def test_tensors_of_another_model_are_listed(changes, problem):
    with pytest.raises(ValueError, match="a bell checkpoint must have 3 tensors") as raised:
        require(tensors(**changes))
    assert raised.match(problem)

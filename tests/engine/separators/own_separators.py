"""Separators of a user's own, for the tests of dotted names."""

from tests.support.signals import BandSeparator


def open_bands(device):
    return BandSeparator()


class Fingerprinted(BandSeparator):
    fingerprint = "my weights, version 7"

    def __init__(self, device):
        super().__init__()
        self.device = device


open_on = lambda device: Fingerprinted(device)  # noqa: E731, PLW0108 - a lambda that plain pickle refuses


class NoLabels:
    sample_rate_hz = 8000

    def __init__(self, device):
        pass

    def separate(self, mix_BT, queries, *, lengths=None):
        return mix_BT


class NoSeparate:
    sample_rate_hz, labels = 8000, ("low",)

    def __init__(self, device):
        pass


def with_rate(rate_hz):
    separator = BandSeparator()
    separator.sample_rate_hz = rate_hz
    return separator


def float_rate(device):
    return with_rate(8000.0)


def true_rate(device):
    return with_rate(True)


def no_rate(device):
    return with_rate(0)


def text_labels(device):
    separator = BandSeparator()
    separator.labels = "low"
    return separator


not_callable = 5


def takes_no_device():
    return NoLabels("cpu")

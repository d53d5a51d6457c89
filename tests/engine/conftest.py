"""Fixtures that several tests of the engine share."""

from tests.support.closed_pass import closed_pass, out  # noqa: F401 - fixtures

"""Renders a report's templates into one page: style, script and data are inside, and nothing is loaded from outside."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import logging
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jinja2
import markupsafe

from engine.cli.display import MAX_MESSAGE, shown
from engine.cli.tables import Table
from tune.report.parts import rule_text

_LOGGER = logging.getLogger(__name__)
_NUMBER = re.compile(r"[+-]?\d[\d,]*(\.\d+)?%?( [±/] [+-]?\d+(\.\d+)?| (s|min|h))?")
_PACKAGES = ("clearsep-engine", "ray", "torch", "torchaudio", "numpy", "pyarrow")


@contextmanager
def only_warned(folder: object) -> Iterator[None]:
    """Turn whatever prevents a report into a warning, because the work that it reports is done."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - hours of work must not fail at their description
        cause = f"{type(error).__name__}: {error}"
        _LOGGER.warning(f"cannot write the report of {folder} ({cause}); `clearsep report {folder}` tries it again")


def render(template: str, **values: Any) -> str:  # noqa: ANN401 - the values of the template
    """The page of a template. All text in it is foreign and escaped; only the project's own script can run."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tune.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalized,
    )
    environment.filters |= {"shown": shown, "is_number": is_number, "words": rule_text}
    style, script = (_own(environment, name) for name in ("style.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {
        "style": style,
        "script": script,
        "script_hash": f"sha256-{digest}",
        "versions": _versions(),
    }
    return environment.get_template(template).render(**values)


def _own(environment: jinja2.Environment, name: str) -> markupsafe.Markup:
    """A file of ours as it is."""
    assert environment.loader is not None
    return markupsafe.Markup(environment.loader.get_source(environment, name)[0])


def _finalized(value: object) -> object:
    """A value as the page has it: foreign text, if it is not HTML of ours."""
    return value if isinstance(value, markupsafe.Markup) else shown(value, most=MAX_MESSAGE)


def is_number(cell: str) -> bool:
    """True for a number, maybe with a spread, a second one or a percent sign: tables align it at the right."""
    return _NUMBER.fullmatch(cell) is not None


def _versions() -> Table:
    """Versions of what writes the report."""
    rows = [["Python", platform.python_version()]]
    for name in _PACKAGES:
        try:
            rows.append([name, importlib.metadata.version(name)])
        except importlib.metadata.PackageNotFoundError:
            continue
    return Table(title="Versions that wrote this report", columns=["package", "version"], rows=rows)

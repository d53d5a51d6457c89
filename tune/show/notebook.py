"""Results of the Python API in a notebook: their tables, and for stems their sound and their spectrogram.

They stay dictionaries and lists; a notebook calls their ``_repr_html_``, whose HTML needs no script and no network.
Its size is limited: of long tables, many stems and long sounds it has the first ones and seconds.
"""

from __future__ import annotations

import base64
import functools
import html
import importlib
import logging
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from engine.errors import AudioError

if TYPE_CHECKING:
    import numpy as np

    from engine.cli.tables import Table

MOST_ROWS, MOST_SOUNDS, MOST_S = 100, 12, 30.0
_TABLES = {
    "distil": "train.tables:curve_table",
    "evaluate": "train.tables:evaluation_table",
    "label_corpus": "engine.cli.tables:label_tables",
    "run": "tune.tables:run_tables",
    "run_pass": "engine.cli.tables:pass_table",
    "score_files": "engine.cli.tables:scores_table",
    "search": "tune.search.report:search_tables",
    "select_tracks": "engine.cli.tables:tracks_table",
    "separate_file": "engine.cli.tables:stems_table",
}
"""Tables of the results of public functions, as ``module:function``."""
_COLOUR = bytes((60, 130, 200))  # of spectrograms, visible on light and on dark pages


class _Shown:
    """A result that a notebook shows as tables."""

    source = ""
    """The public function that returned it."""

    def _repr_html_(self) -> str | None:
        """The result as HTML; None, so that its text is shown, if it is empty or was changed."""
        try:
            return (_result_html(self.source, self) or None) if self else None
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


class ShownRecord(_Shown, dict[str, object]):
    """A record that a notebook shows as tables."""


class ShownRecords(_Shown, list[object]):
    """Records that a notebook shows in one table."""


def with_display(name: str, public: Callable[..., Any]) -> Callable[..., Any]:
    """The public function of a name, whose result a notebook shows if there are tables for it."""
    if name not in _TABLES:
        return public

    @functools.wraps(public)
    def call(*given: Any, **named: Any) -> Any:  # noqa: ANN401 - of any function
        _log_in_notebook()
        return _shown(name, public(*given, **named))

    call.__module__, call.__qualname__ = "clearsep", name  # so that it can be pickled
    return call


def _log_in_notebook() -> None:
    """Print the progress of a call in a cell that runs it, unless the notebook has set its own log."""
    logger = logging.getLogger("engine")
    if "ipykernel" in sys.modules and logger.level == logging.NOTSET and not logger.isEnabledFor(logging.INFO):
        from engine.cli.console import show_progress

        show_progress()


def _shown(source: str, result: Any) -> ShownRecord | ShownRecords:  # noqa: ANN401 - of any function
    is_one = isinstance(result, Mapping)
    shown = ShownRecord(result) if is_one else ShownRecords(_shown(source, one) for one in result)
    shown.source = source
    return shown


def _result_html(source: str, result: Any) -> str:  # noqa: ANN401 - of any function
    module, _, function = _TABLES[source].partition(":")
    is_list = source in ("score_files", "separate_file")
    result = [result] if is_list and isinstance(result, Mapping) else result
    tables = getattr(importlib.import_module(module), function)(result)
    parts = [_table_html(one) for one in (tables if isinstance(tables, list) else [tables])]
    if source == "search":
        parts.insert(0, f"<p>{_text(result['verdict_text'])}</p>")
    if source == "separate_file":
        parts.append(_sounds_html(result))
    return "".join(parts)


def _text(value: object) -> str:
    from engine.cli.display import MAX_MESSAGE, shown

    return html.escape(shown(value, most=MAX_MESSAGE))


def _table_html(table: Table) -> str:
    more = f" (the first {MOST_ROWS} of {len(table.rows)} rows)" if len(table.rows) > MOST_ROWS else ""
    lines = [_row("th", map(_text, table.columns)), *(_row("td", map(_text, row)) for row in table.rows[:MOST_ROWS])]
    return f"<table><caption>{_text(table.title)}{more}</caption>{''.join(lines)}</table>"


def _row(tag: str, cells: Iterable[str]) -> str:
    return "<tr>" + "".join(f'<{tag} style="text-align: left">{cell}</{tag}>' for cell in cells) + "</tr>"


def _sounds_html(stems: Sequence[Mapping[str, Any]]) -> str:
    """The recordings and their stems to play, with one gain for all, as their levels differ."""
    from tune.report.listen import common_gain, strongest

    named = {stem["source"]: "mixture" for stem in stems} | {stem["path"]: stem["query"] for stem in stems}
    chosen = list(named.items())[:MOST_SOUNDS]
    signals = [_read(path) for path, _ in chosen]
    there = [signal for signal in signals if not isinstance(signal, str)]
    gain = common_gain(samples_T for samples_T, _ in there)
    top = max((strongest(gain * samples_T, rate_hz) for samples_T, rate_hz in there), default=1.0)
    rows = [
        _row("td", (_text(name), *([_text(one), ""] if isinstance(one, str) else _sound(gain * one[0], one[1], top))))
        for (_, name), one in zip(chosen, signals, strict=True)
    ]
    more = f"the first {len(chosen)} of {len(named)} sounds, " if len(named) > len(chosen) else ""
    return f"<table><caption>Sounds ({more}at most {MOST_S:g} s)</caption>{''.join(rows)}</table>"


def _read(path: str) -> tuple[np.ndarray, int] | str:
    """The first seconds of a file and their rate; the reason if it cannot be read."""
    from engine.audio.decoder import shared_decoder

    try:
        about = shared_decoder().probe(path)
        most_s = min(MOST_S, about.duration_s)
        return shared_decoder().decode(
            path, sample_rate_hz=about.sample_rate_hz, duration_s=most_s
        ), about.sample_rate_hz
    except (AudioError, OSError) as error:
        return str(error)


def _sound(samples_T: np.ndarray, rate_hz: int, top: float) -> Iterable[str]:
    from tune.report.listen import BANDS, COLUMNS, played_sound

    made = played_sound("", samples_T, rate_hz, top)
    picture = base64.b64encode(_png(base64.b64decode(made.picture), BANDS, COLUMNS)).decode("ascii")
    yield f'<audio controls src="data:audio/webm;base64,{made.opus}"></audio>'
    yield f'<img alt="spectrogram" width="{COLUMNS}" height="{BANDS}" src="data:image/png;base64,{picture}">'


def _png(levels: bytes, height: int, width: int) -> bytes:
    """A spectrogram as PNG, whose levels are opacities of one colour; ``levels`` has the lowest band first."""
    lines = (levels[line * width : (line + 1) * width] for line in reversed(range(height)))
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE": 256 * _COLOUR,
        b"tRNS": bytes(range(256)),
        b"IDAT": zlib.compress(b"".join(b"\0" + line for line in lines)),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)

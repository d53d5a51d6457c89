"""Names, labels and messages of others are shown as they are, by all commands, and change nothing else on a screen."""

from __future__ import annotations

import ast
import json
import logging
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

import cluster.cli
from engine.cli import display
from engine.cli.console import print_log, print_result, show_progress
from engine.cli.tables import Table
from engine.passes.records import Totals
from engine.passes.speed.progress import PassProgress
from engine.schema import failure
from engine.storage.files import write_json
from tests.project.sources import BESIDES, SOURCES, name_of, parsed
from tests.support.command import Cli
from tune.search.progress import Progress

Write = Callable[..., Path]
NAMES = {
    "closing markup": ("take [/2] left", "take [/2] left"),
    "markup": ("Title [abc123] [bold red]x[/]", "Title [abc123] [bold red]x[/]"),
    "emoji code": (":smile: bell", ":smile: bell"),
    "escape code": ("a\x1b[31;1mred\x9b2J", r"a\x1b[31;1mred\x9b2J"),
    "line break": ("a\nerror: forged\r\x0b\x85\u2028b", r"a\nerror: forged\r\x0b\x85\u2028b"),
    "tab": ("a\tb", r"a\tb"),
    "reversed": ("a\u202egpj-exe\u2066\u200f", r"a\u202egpj-exe\u2066\u200f"),
    "invisible": ("a\u200b\ufeffb\u00ad", r"a\u200b\ufeffb\xad"),
    "emoji": ("👩\u200d🚀 café Ж 犬", "👩\u200d🚀 café Ж 犬"),
    "table signs": ("a | b ` * <script>alert(1)</script>", "a | b ` * <script>alert(1)</script>"),
    "backslash": (r"C:\new\table", r"C:\new\table"),
}
UNENCODED = {"NUL": ("a\0b", r"a\x00b"), "surrogate": ("a\udc80b", r"a\udc80b")}  # in no file of ours
LONG = "x" * 4092 + "tail"
named = pytest.mark.parametrize("name", NAMES)
SCORED = {"re_sdr_db": 20.0, "re_si_sdr_db": 20.0, "remix_snr_db": 20.0, "stem_level_db": -3.0}


def cells(out: str) -> str:
    """What a screen shows, without the lines of tables and the places where cells are folded."""
    return re.sub(r"[^\S ]*[│┃][^\S\n]*", "", "".join(re.split(r"\s*[│┃]\n[│┃]\s*", out)))


def require_harmless(text: str) -> None:
    """Nothing of the text but its line breaks is more than letters on the screen."""
    hidden = [one for one in text if unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert set(hidden) <= {"\n", "\u200d"}, text
    assert not re.search(r"^(error|warning): forged", text, re.MULTILINE)


def require_shown(text: str, name: str) -> None:
    require_harmless(text)
    assert (NAMES | UNENCODED)[name][1] in text


@pytest.mark.parametrize("name", NAMES | UNENCODED)
def test_text_is_shown_as_it_is_on_one_line(name: str) -> None:
    given, expected = (NAMES | UNENCODED)[name]
    assert display.shown(given) == expected
    assert display.shown(expected) == expected, "what can be seen does not change"


def test_long_text_is_shortened_and_its_end_is_visible() -> None:
    short = display.shown(LONG)
    assert len(short) < 330
    assert short.endswith("tail") and "3796 more" in short
    assert len(display.shown("\u202e" * 4096)) < 330
    assert len(display.shown("x" * 300)) == 300


# Every command.


def failed(name: str) -> dict[str, Any]:
    clip = {"clip_id": "c", "path": f"{name}.wav", "labels": [name], "start_s": None, "end_s": None}
    return dict(failure(clip, step="decode", error=ValueError(f"cannot read {name}; repair it")))


@named
def test_failures_and_passes(cli: Cli, write_pass: Write, tmp_path: Path, name: str) -> None:
    label = NAMES[name][0]
    out = write_pass([("clip", label, np.zeros(100, np.float32), SCORED)], failures=[failed(label)])
    found = cli("failures", out)
    require_shown(found.out, name)
    assert found.out.count(NAMES[name][1]) == 4, "path and message, in both tables"
    require_shown(cli("inspect", out).out, name)
    require_shown(cli("inspect", out / "stems" / "shard-000000-0000.parquet").out, name)
    require_shown(cli("filter", out, "-o", tmp_path / "tracks").out, name)
    require_shown(cli("inspect", tmp_path / "tracks").out, name)
    exact = cli("failures", out, "--json").document()["failures"][0]
    assert (exact["path"], exact["labels"]) == (f"{label}.wav", [label])
    assert label in cli("filter", out, "-o", tmp_path / "tracks", "--json").document()["kept_by_label"]


def test_a_long_label_is_shortened_by_all_of_them(cli: Cli, write_pass: Write, tmp_path: Path) -> None:
    out = write_pass([("clip", LONG, np.zeros(100, np.float32), SCORED)], failures=[failed(LONG)])
    for words in (["failures", out], ["inspect", out], ["filter", out, "-o", tmp_path / "tracks"]):
        text = cli(*words).out
        assert "tail" in text and "more" in text
        assert text.count("x") < 2000
    assert LONG in cli("failures", out, "--json").out


def run_record(label: str) -> dict[str, Any]:
    figures = {"sdri_db": 1.0, "si_sdri_db": 1.0, "num_stems": 3}
    return {
        **dict.fromkeys(("num_clips", "num_set_aside", "num_queries", "num_stems", "num_kept", "num_failed"), 1),
        **{"iteration": 1, "num_rejected": {}, "kept_h": 0.1, "thresholds": {"min_re_sdr_db": 3.0}, "wall_s": 1.0},
        "validation": figures | {"by_label": {label: figures}},
    }


@named
def test_runs_checkpoints_and_corpora(cli: Cli, tmp_path: Path, write_checkpoint: Write, name: str) -> None:
    label = NAMES[name][0]
    write_json(tmp_path / "run" / "summary.json", {"iterations": [run_record(label)]})
    (tmp_path / "run" / "iterations").mkdir()
    require_shown(cli("inspect", tmp_path / "run").out, name)
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"path": "a.wav", "labels": [label, "rain"]}) + "\n")
    for path in (write_checkpoint([label, "rain"]), tmp_path / "corpus.jsonl"):
        found = cli("inspect", path)
        assert found.code == 0
        require_harmless(found.out)
        assert (json.dumps(label, ensure_ascii=False)[1:4] in found.out) or name in ("invisible", "reversed")
    assert label in cli("inspect", tmp_path / "corpus.jsonl", "--json").document()["labels"]


@named
def test_scores_and_evaluations(cli: Cli, tmp_path: Path, write_checkpoint: Write, name: str) -> None:
    label = NAMES[name][0]
    noise_T = np.random.default_rng(0).normal(0, 0.1, 4000).astype(np.float32)
    paths = [tmp_path / "mixture.wav", tmp_path / f"{label.replace('/', '')}.wav"]
    for path in paths:
        soundfile.write(path, noise_T, 8000)
    found = cli("score", *paths)
    require_harmless(found.out)
    assert display.shown(label.replace("/", "")).strip() in found.out
    missing = cli("score", paths[0], tmp_path / f"{label.replace('/', '')}-gone.wav")
    require_harmless(missing.error())
    assert cli("evaluate", write_checkpoint(["bell", "rain"]), "--clips", tmp_path / f"{label}.csv").error()


@named
def test_wrong_command_lines(cli: Cli, name: str) -> None:
    """What a shell put into the command line, such as file names, is in the messages about its use too."""
    for words in ([NAMES[name][0]], ["settings", "--" + NAMES[name][0]], ["plan", "a", "--rows", NAMES[name][0]]):
        outcome = cli(*words)
        assert (outcome.code, outcome.out) == (2, "")
        require_harmless(outcome.err)
    require_harmless(cli("inspect", NAMES[name][0]).error())  # which quotes it
    require_shown(cli("settings", NAMES[name][0]).error(), name)
    require_shown(cli("filter", "a", "-o", "b", "--set", f"{NAMES[name][0]}=1").error(), name)


@named
def test_jobs_of_a_cluster(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Other people's jobs have names, messages and logs of their own."""
    foreign = NAMES[name][0]
    job = dict.fromkeys(("job", "command", "out", "started", "message"), foreign)
    job |= {"status": "FAILED", "wall_s": 1.0, "exit_code": 1, "metadata": {}}
    log = f"{foreign}\nsecond line\n"
    monkeypatch.setattr(cluster.cli, "_server", lambda given: SimpleNamespace(get_job_logs=lambda one: log))
    monkeypatch.setattr(cluster.cli.jobs, "list_jobs", lambda server: [job])
    monkeypatch.setattr(cluster.cli.jobs, "job_state", lambda server, one: job)
    monkeypatch.setattr(cluster.cli.jobs, "follow", lambda server, one, write: write(log) or 1)
    monkeypatch.setattr(cluster.cli, "submit_job", lambda server, command, config: "job")
    require_shown(cli("jobs", "list").out, name)
    require_shown(cli("jobs", "status", "job").out, name)
    for words in (["jobs", "logs", "job"], ["jobs", "logs", "job", "--follow"], ["submit", "run", "laptop", "-o", "b"]):
        found = cli(*words)
        require_harmless(found.out.replace("\t", "").replace("\nerror: forged", ""))
        assert "\nsecond line\n" in found.out
        require_harmless(found.err)
    nodes = [{"node": foreign, "cpus": 1.0, "gpus": 0.0, "clock_offset_s": None, "problems": [foreign], "notes": []}]
    print_result(lambda: cluster.cli._node_tables(nodes), nodes, False)
    require_shown(capsys.readouterr().out, name)


# Tables, log lines, progress and Markdown, of whatever command.


@pytest.mark.parametrize("name", NAMES | UNENCODED)
def test_a_table_shows_titles_columns_and_cells_as_they_are(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given, expected = (NAMES | UNENCODED)[name]
    monkeypatch.setenv("COLUMNS", "400")
    print_result(lambda: [Table(title=given, columns=[given, "b"], rows=[[given, "1"], ["c", given]])], {}, False)
    out = capsys.readouterr().out
    require_harmless(out)
    assert out.count(expected) == 4
    print_result(lambda: [], {"name": given}, True)
    assert json.loads(capsys.readouterr().out) == {"name": given}


@pytest.mark.parametrize("name", NAMES | UNENCODED)
def test_a_message_is_one_line_whatever_is_in_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    given, expected = (NAMES | UNENCODED)[name]
    show_progress()
    logging.getLogger("engine").warning("cannot read %s; repair it", given)
    logging.getLogger("tune.search").info(f"{given} {LONG}")
    first, second = capsys.readouterr().err.removesuffix("\n").split("\n")
    assert first == f"warning: cannot read {expected}; repair it"
    assert len(second) < 2100 and second.endswith("tail")


class Terminal:
    """Standard error of a terminal."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None: ...


@named
def test_progress_on_a_terminal(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, expected = NAMES[name]
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    progress = Progress(given, lambda parameters: (given, given))
    progress.setup()
    progress.on_trial_start(trial=SimpleNamespace(config={}, trial_id="1", last_result=None))
    progress.on_experiment_end()
    assert terminal.text.count(expected) >= 3
    assert given not in terminal.text or given == expected
    bar = PassProgress(Path("out"), 1.0, Totals(), num_clips=3, doing="separating clips")
    with bar.shown():
        bar.progress.update(bar.bar, description=NAMES["closing markup"][0])
        bar.progress.refresh()
    assert NAMES["closing markup"][0] in terminal.text


@pytest.mark.parametrize(("variable", "value"), [("FORCE_COLOR", "1"), ("TTY_COMPATIBLE", "1"), ("TERM", "dumb")])
def test_progress_in_a_log_is_lines(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose colours are forced, as on some servers, and a terminal that can only append: no bars, log lines."""
    log = Terminal()
    monkeypatch.setattr(log, "isatty", lambda: variable == "TERM")
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setenv(variable, value)
    show_progress()
    bar = PassProgress(Path("out"), 1.0, Totals(), num_clips=3, doing="separating clips")
    with bar.shown():
        bar.progress.update(bar.bar, advance=1)
        bar.progress.refresh()
    assert log.text == ""
    progress = Progress("stage", lambda parameters: ("name", "schedule"))
    progress.setup()
    trial = SimpleNamespace(config={}, trial_id="1", last_result=None)
    progress.on_trial_start(trial=trial)
    progress.on_trial_result(trials=[], trial=trial, result={"iteration": 1, "sdri_db": 1.0, "kept_h": 1.0})
    progress.on_experiment_end()
    assert log.text == "stage: name (schedule), iteration 1: SDRi 1.00 dB, kept 1.000 h, cost  h\n"


def test_a_cell_of_markdown_is_text() -> None:
    text = Table(title="", columns=["a", "b"], rows=[[given, "c"] for given, _ in NAMES.values()]).markdown()
    assert len(text.splitlines()) == 2 + len(NAMES)
    require_harmless(text)
    for line in text.splitlines():
        assert line.replace("\\|", "").count("|") == 3
        assert not re.search(r"(?<!\\)[`*[\]<]", line.replace("---", ""))


def test_a_log_of_a_job_keeps_its_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_log("a\tb\n\x1b]0;title\x07c\r" + LONG)
    assert capsys.readouterr().out == "a\tb\n\\x1b]0;title\\x07c\\r" + LONG


def test_an_encoding_without_a_letter_shows_its_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"path": "a.wav", "labels": ["犬", "😀"]}))
    code = "import sys, clearsep; sys.argv = ['clearsep', 'inspect', sys.argv[1]]; clearsep.main()"
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code, tmp_path / "a.jsonl"],
        capture_output=True, env={"PYTHONIOENCODING": "ascii", "PATH": ""}, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\u72ac" in done.stdout


def test_an_error_of_the_program_itself_is_shown_without_control_codes(tmp_path: Path) -> None:
    code = """if True:
        import clearsep, sys
        import engine.cli.reports
        def broken(path): raise TypeError("forged \\x1b[31m \\u202e [/red]")
        engine.cli.reports.failures_report = broken
        sys.argv = ["clearsep", "failures", "x"]
        clearsep.main()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == r"TypeError: forged \x1b[31m \u202e [/red]"


def test_a_failure_of_any_text_can_be_stored() -> None:
    assert failed("a\udc80")["message"] == r"cannot read a\udc80; repair it"


# No other door.


DOORS = {
    "engine/cli/console.py": {"stdout.write", "stderr.write"},
    "engine/cli/selfcheck.py": {"stdout.write"},  # JSON
    "engine/storage/lock.py": {"stderr.write"},
    "cluster/cli.py": {"stdout.write"},  # the id of a job
    "tune/cli.py": {"stdout.write"},  # docs/settings.md
    "benchmarks/pages.py": {"print"},
}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_is_printed_but_by_the_display(path: Path) -> None:
    used = set()
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call):
            continue
        text = ast.unparse(node.func)
        used |= {text} & {"print", "typer.echo", "typer.secho", "rich.print", "warnings.warn"}
        used |= {f"{stream}.write" for stream in ("stdout", "stderr") if text == f"sys.{stream}.write"}
    assert used <= DOORS.get(name_of(path), set())


@pytest.mark.parametrize("path", [*SOURCES, *BESIDES], ids=name_of)
def test_text_of_rich_is_made_without_markup(path: Path) -> None:
    """A console of one's own, a table of rich and a column of progress would take names for markup."""
    if name_of(path) == "engine/cli/display.py":
        return
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            assert name not in (
                "Console",
                "from_markup",
                "from_ansi",
                "render_markup",
                "add_column",
                "add_row",
                "Panel",
            )
            if name in ("TextColumn", "SpinnerColumn"):
                assert "markup=False" in ast.unparse(node)

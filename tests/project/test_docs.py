"""The pages of the project: sizes, links, commands, settings and code in them are right."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import typer.main
import yaml

import clearsep
from engine.cli.describe_settings import describe_settings
from engine.passes.config import PassConfig
from engine.selection.thresholds import Thresholds
from engine.settings import build, override
from engine.storage.files import check_record
from engine.taggers.label_map import TaggerFile
from tests.project.sources import SOURCES, files_of, name_of, parsed
from tests.project.test_words import literal
from tests.support import ROOT
from train.api import TrainingConfig
from train.evaluation.mixtures import ValidationConfig
from train.judges.calibrate import CalibrationConfig
from tune.config import RunConfig
from tune.schedule import resolve_schedule
from tune.search.config import SearchConfig
from tune.search.read_space import read_space

README = ROOT / "README.md"
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *files_of("docs", "examples", "benchmarks", suffix=".md"),
]
TEXTS = [*PAGES, *files_of("examples")]
COMMAND = re.compile(r"^(?:\.venv/bin/)?clearsep (?P<arguments>[a-z].*)")
PLACEHOLDERS = {"FIRST": "127.0.0.1", "JOB": "raysubmit_1", "COMMAND": "demo"}
CLICK_ERROR = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
ALL_SETTINGS = {setting.name for setting in describe_settings(RunConfig)}
CONFIG_OF = {
    "run": RunConfig,
    "demo": RunConfig,
    "separate-corpus": PassConfig,
    "plan": PassConfig,
    "label": PassConfig,
    "filter": Thresholds,
    "score": Thresholds,
    "distil": TrainingConfig,
    "calibrate": CalibrationConfig,
    "evaluate": ValidationConfig,
    "tune": SearchConfig,
}


def per_page(pages):
    return pytest.mark.parametrize("page", pages, ids=name_of)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


def inline_code(page: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def command_lines(page: Path) -> list[list[str]]:
    """Arguments of every ``clearsep`` command in the blocks and the prose of a page, or in a script's docstring."""
    if page.suffix == ".py":
        lines = [match.strip() for match in re.findall(r"`(clearsep [^`]+)`", page.read_text())]
    else:
        in_blocks = "\n".join(block.text for block in blocks(page) if block.language in ("", "bash", "console"))
        lines = re.sub(r"\\\n\s*", " ", in_blocks).splitlines() + inline_code(page)
    matches = (COMMAND.match(line) for line in lines)
    words = [shlex.split(match["arguments"].partition(" > ")[0], comments=True) for match in matches if match]
    return [[PLACEHOLDERS.get(word, word) for word in one] for one in words if "…" not in " ".join(one)]


def check_command(words: list[str]) -> None:
    """Parse a command line without running it; of one that only names a command, check that there is such a command."""
    group = typer.main.get_command(clearsep.command_line())
    while words and words[0] in getattr(group, "commands", {}):
        group, words = group.commands[words[0]], words[1:]
    assert not hasattr(group, "commands") or not words, f"there is no command {words}"
    if not words or "--help" in words:
        return
    parameters = group.make_context(group.name, list(words)).params
    if group.name == "submit":
        check_command([parameters["command"], *parameters["arguments"]])
    for text in parameters.get("set_") or []:
        check_setting(text, {setting.name for setting in describe_settings(CONFIG_OF[group.name])})


def check_setting(text: str, known: set[str]) -> None:
    """A ``key=value`` names a setting, or a config class with settings inside."""
    override({}, [text])
    key = re.sub(r"\.\d+(?=\.|$)", "", text.partition("=")[0])
    assert any(name == key or name.startswith(f"{key}.") for name in known), f"there is no setting {key}"


# README.


def test_readme_is_short_and_narrow():
    lines = README.read_text().splitlines()
    assert len(lines) <= 200
    assert [number for number, line in enumerate(lines, 1) if len(line) > 100] == []


def test_readme_begins_with_the_claim_and_the_table():
    head, _, _ = README.read_text().partition("\n## ")
    rows = [line for line in head.splitlines() if line.startswith("| ")]
    assert "separates natural clips" in " ".join(head.split())
    assert len(rows) == 7, "a header, its line and five rows"


def test_readme_has_its_first_command_by_line_30():
    lines = README.read_text().splitlines()
    assert next(number for number, line in enumerate(lines, 1) if line.startswith("make ")) <= 30


# Pictures.


@per_page(files_of("docs", suffix=".svg"))
def test_a_picture_loads_nothing(page):
    text = page.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert re.findall(r"https?:|@import|@font-face|<script|href", text) == []
    assert set(re.findall(r"url\((.)", text)) <= {"#"}


# Links.


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@per_page(PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_of_docs_is_one_or_two_links_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[^)#\s]+\.md)", README.read_text()))
    assert linked == {name_of(page) for page in files_of("docs", suffix=".md")}


def strings(path: Path) -> set[str]:
    """Every text in a file of the source, with … for what is filled in."""
    texts = (literal(node) for node in ast.walk(parsed(path)))
    return {re.sub(r"(\{[^{}]*\})+", "…", text.replace("%s", "…")) for text in texts if text}


def test_messages_of_the_troubleshooting_page_are_in_the_source():
    quoted = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    known = "\n".join(text for path in SOURCES for text in sorted(strings(path)))
    assert len(quoted) >= 15
    assert [message for message in quoted if message not in known] == []


# Commands and settings.


@per_page(TEXTS)
def test_commands_parse(page):
    for words in command_lines(page):
        try:
            check_command(words)
        except (CLICK_ERROR, AssertionError, ValueError) as error:
            pytest.fail(f"clearsep {shlex.join(words)}: {getattr(error, 'message', error)}")


@pytest.mark.parametrize(
    "line", ["no-such-command x", "filter PASS", "run laptop -o RUN --set distil.stepz=1", "jobs halt x"]
)
def test_a_wrong_command_is_found(line):
    with pytest.raises((CLICK_ERROR, AssertionError)):
        check_command(line.split())


def options(group) -> set[str]:
    """Options of all commands of a group."""
    own = {name for one in group.params for name in (*one.opts, *one.secondary_opts)}
    return own.union(*(options(one) for one in getattr(group, "commands", {}).values()))


@per_page([page for page in PAGES if page.parent.name != "benchmarks" and page.name != "CHANGELOG.md"])
def test_options_exist(page):
    known = options(typer.main.get_command(clearsep.command_line())) | {"--help", "--esc10", "--quick"}
    named = {name for text in inline_code(page) for name in re.findall(r"(?:^| )(--[a-z][a-z-]+)", text)}
    assert named <= known


@per_page(PAGES)
def test_settings_exist(page):
    roots = {name.partition(".")[0] for name in ALL_SETTINGS if "." in name}
    for text in inline_code(page):
        key = re.match(r"([a-z_]+(?:\.[a-z_]+)+)(?:$|=|: )", text)
        if key and key[1].partition(".")[0] in roots and not key[1].endswith((".md", ".py", ".json", ".csv")):
            if page.name in ("CHANGELOG.md", "log.md"):  # they name settings of the past too
                continue
            check_setting(f"{key[1]}=1", ALL_SETTINGS)


@per_page([page for page in PAGES if any(block.language == "yaml" for block in blocks(page))])
def test_yaml_is_right(page):
    for block in blocks(page):
        if block.language != "yaml":
            continue
        settings = yaml.safe_load(block.text)
        if "trials" in settings:
            config = build(SearchConfig, settings)
            assert read_space(config.schedule, config.iterations).thresholds
            for key in config.set:
                check_setting(f"{key}=1", ALL_SETTINGS)
        elif "model" in settings:
            check_record(settings, TaggerFile, page, remedy="correct the page")
        else:
            assert resolve_schedule(settings["schedule"])


@per_page(PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join([*inline_code(page), *(block.text for block in blocks(page))])
    assert set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) <= targets


# Code.


@per_page([page for page in PAGES if any(block.language == "python" for block in blocks(page))])
def test_python_compiles_and_uses_public_names(page):
    for block in blocks(page):
        if block.language != "python":
            continue
        source = re.sub(r"^(?:>>> |\.\.\. )", "", block.text, flags=re.MULTILINE)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "cs":
                assert node.attr in dir(clearsep)


# The site.


def build_site(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]  # --quiet would be lenient
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def test_the_site_is_refused_with_a_broken_link_or_an_unlisted_page(tmp_path):
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    (tmp_path / "docs" / "new.md").write_text("[one](nothing.md) and [two](concepts.md#nothing)\n")
    done = build_site(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "Aborted with 3 warnings" in done.stdout + done.stderr


def test_the_site_has_every_page_and_needs_no_server(tmp_path):
    done = build_site(ROOT, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in PAGES:
        name = name_of(page).removeprefix("docs/")
        named = {"README.md": "index", "examples/README.md": "examples"}.get(name, name.removesuffix(".md"))
        text = (tmp_path / f"{named if '/' in named else named.lower()}.html").read_text()
        loaded = re.findall(r'<(?:link|script|img)\b[^>]*?\b(?:href|src)="([^"]*)"', text)
        assert loaded and not [address for address in loaded if "//" in address or address.startswith("/")]
        files = {address.partition("#")[0] for address in re.findall(r'\b(?:href|src)="(?!\w+:)([^"]+)"', text)}
        here = tmp_path / Path(named).parent
        assert [file for file in files if file and not (here / file).is_file()] == []

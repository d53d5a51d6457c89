"""Plain English: a few words that a reader has to translate stay out, and every error says rule, value and remedy."""

import ast
import io
import re
import tokenize

import pytest

from tests.project.sources import BESIDES, SOURCES, files_of, name_of, parsed
from tests.support import ROOT

BANNED = re.compile(
    r"\b(told|tells? (of|how it goes)|heard|hears|lest|whoever|likewise|gone on|goes on|go on with|going on with"
    r"|as ever|is asked|are asked|was asked|asked for|asker|assessor|beside|anew|whilst|thereof|wherein|ere|nay)\b",
    re.IGNORECASE,
)
BANNED_NAMES = re.compile(r"(^|_)(told|heard|hears|asked|asker|lest|beside|say|says|said|hush|whole|anew|gauges)(_|$)")
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *files_of("docs", "benchmarks", suffix=".md"),
]
CODE = [*SOURCES, *BESIDES]


def per_file(paths):
    return pytest.mark.parametrize("path", paths, ids=name_of)


def tokens(path):
    return tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)


@per_file(CODE)
def test_code_is_written_in_plain_words(path):
    kinds = (tokenize.STRING, tokenize.COMMENT)
    texts = [(token.start[0], token.string) for token in tokens(path) if token.type in kinds]
    assert [(line, match[0]) for line, text in texts for match in BANNED.finditer(text)] == []


@per_file(CODE)
def test_names_are_plain_words(path):
    names = {token.string for token in tokens(path) if token.type == tokenize.NAME}
    assert sorted(name for name in names if BANNED_NAMES.search(name)) == []


@per_file(PAGES)
def test_pages_are_written_in_plain_words(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [(number, match[0]) for number, line in enumerate(lines, 1) for match in BANNED.finditer(line)] == []


FORMS = (
    re.compile(r"\bmust\b.*, got .*; ", re.DOTALL),
    re.compile(r"\bcannot\b.*; ", re.DOTALL),
    re.compile(r"\bthere (is|are) no .*; ", re.DOTALL),
)
NO_MESSAGE = {"AssertionError", "SystemExit", "Exit", "KeyboardInterrupt", "TimeoutError", "EOFError", "AttributeError"}


def messages(path):
    """(line, text) of every message that is raised as it is written; ``{}`` stands for what is filled in."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            name = ast.unparse(node.exc.func).rpartition(".")[2]
            text = literal(node.exc.args[0])
            if text is not None and name not in NO_MESSAGE:
                yield node.lineno, text


def literal(node):
    """Text of a string or f-string; null for anything else, such as a call that makes the message."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [literal(side) for side in (node.left, node.right)]
        return "".join(part if part is not None else "{}" for part in parts)
    return None


@per_file(SOURCES)
def test_errors_say_rule_value_and_remedy(path):
    """ "X must be ..., got ...; remedy", "cannot ... (cause); remedy" or "there is no X; remedy"."""
    wrong = [
        (line, text)
        for line, text in messages(path)
        if text.strip("{} :;") and not any(form.search(text) for form in FORMS)
    ]
    assert wrong == []


def test_the_form_is_seen():
    source = 'def f(x):\n    raise ValueError(f"clip_s is above 0, not {x}: choose a length such as 10")\n'
    (node,) = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    assert not any(form.search(literal(node.exc.args[0])) for form in FORMS)
    assert any(form.search("clip_s must be above 0, got 0.0; choose a length such as 10") for form in FORMS)

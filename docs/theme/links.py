"""Hook of MkDocs: pages outside ``docs/`` join the site, and links to files that are not in it become plain text.

GitHub and MkDocs also differ in nested lists, which need four spaces in MkDocs.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
NAMES = {"README.md": "index.md", "examples/README.md": "examples.md"} | {
    name: name.lower() for name in ("CONTRIBUTING.md", "CHANGELOG.md")
}
BENCHMARKS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("benchmarks/**/*.md"))
OUTSIDE = NAMES | {name: name for name in BENCHMARKS}
"""Name in the site of every page that is not in ``docs/``, by its path in the repository."""
SOURCES = {name: path for path, name in OUTSIDE.items()}
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
NESTED = re.compile(r"^ {2,3}(?=(?:[-*]|\d+\.) )", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages outside ``docs/``."""
    for path, name in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page, outside its code."""
    name = page.file.src_uri
    folder = posixpath.dirname(SOURCES.get(name, f"docs/{name}"))

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if re.match(r"\w+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        to = OUTSIDE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(to) is None and not path.startswith("docs/"):
            return text
        return f"[{text}]({posixpath.relpath(to, posixpath.dirname(name) or '.')}{anchor})"

    parts = FENCE.split(markdown)
    return "".join(part if part.startswith("```") else NESTED.sub("    ", LINK.sub(link, part)) for part in parts)

"""What the site needs beside MkDocs: formulas without JavaScript, and the files that pages link to.

Formulas become MathML when the site is built, so browsers show them without network.
A link out of docs/ (a benchmark's results, a source file) leads to a copy under linked/.
"""

import html
import logging
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_log = logging.getLogger("mkdocs.hooks.site")  # a warning fails a strict build
_ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"\]\(\.\./([^)#\s]+)\)")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
_ROLE = re.compile(r":(?:class|meth|func|mod):<code>~?(.*?)</code>")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each file that a page of docs/ links to outside, as it is or as code."""
    for page in list(files.documentation_pages()):
        for path in _LINK.findall(page.content_string):
            source = _ROOT / path
            if not source.is_file():
                _log.warning("%s links to ../%s, which is not there", page.src_uri, path)
            elif files.get_file_from_path(_linked(path)) is None:
                text = source.read_text(encoding="utf-8")
                if source.suffix != ".md":
                    text = f"# {path}\n\n```{source.suffix[1:]}\n{text}```\n"
                files.append(File.generated(config, _linked(path), content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Point links out of docs/ to the pages made of those files."""
    up = posixpath.relpath(".", posixpath.dirname(page.file.src_uri) or ".")
    return _LINK.sub(lambda match: f"]({up}/{_linked(match[1])})", markdown)


def _linked(path: str) -> str:
    return f"linked/{path}" if path.endswith(".md") else f"linked/{path}.md"


def on_page_content(content: str, page: Page, **_: object) -> str:
    """Formulas -> MathML; Sphinx's roles in docstrings -> code."""

    def formula(match: re.Match[str]) -> str:
        tag, kind, latex = match.groups()
        display = "inline" if kind == "(" else "block"
        return f"<{tag}>{convert(html.unescape(latex).strip(), display=display)}</{tag}>"

    content = _FORMULA.sub(formula, content)
    wanted, made = (page.markdown or "").count("```math"), content.count('display="block"')
    if made != wanted or "merror" in content:
        _log.warning("%s: %d of %d formulas became MathML", page.file.src_uri, made, wanted)
    return _ROLE.sub(r"<code>\1</code>", content)

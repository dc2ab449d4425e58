"""The examples of the documentation run, page by page, in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import jaxbound  # noqa: F401  (sets XLA's flags before the first test starts a backend)

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [page for page in sorted(DOCS.rglob("*.md")) if not {"_build", "_generated"} & set(page.parts)]
PAGES += [DOCS.parent / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS.parent).with_suffix("")))
def test_examples_run(page):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    exec(compile("\n".join(blocks), str(page), "exec", dont_inherit=True), {"__name__": page.stem})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS.parent).with_suffix("")))
def test_every_page_has_an_example(page):
    """Code that runs, code that is marked as not run here, commands, or docstrings, which have examples of their own."""
    text = page.read_text(encoding="utf-8")
    if page.stem == "contributing":
        text = (DOCS.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    fences = re.findall(r"^```(.*)\n(?:.*\n)*?```$", text, re.MULTILINE)
    unknown = {fence for fence in fences if not fence.startswith("{")} - {"python", "py", "sh", "text", "bibtex"}
    assert not unknown, "python runs, py does not, sh are commands, text is output"
    assert (
        any(not fence.startswith("{") for fence in fences)
        or "{eval-rst}" in text
        or "{autofunction}" in text
        or page.stem == "index"
    )


def test_the_landing_page_shows_what_its_example_prints(capsys):
    code, shown = re.search(
        r"^```python\n(.*?)^```\s+^```text\n(.*?)^```", (DOCS / "index.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    ).groups()
    assert code.count("\n") <= 13
    exec(compile(code, "index.md", "exec", dont_inherit=True), {"__name__": "index"})
    assert re.sub(r"(\d\.\d\d)\d*", r"\1", capsys.readouterr().out) == re.sub(r"(\d\.\d\d)\d*", r"\1", shown)

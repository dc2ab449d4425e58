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
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": page.stem})


def test_the_landing_page_shows_what_its_example_prints(capsys):
    code, shown = re.search(
        r"^```python\n(.*?)^```\s+^```text\n(.*?)^```", (DOCS / "index.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    ).groups()
    assert code.count("\n") <= 13
    exec(compile(code, "index.md", "exec"), {"__name__": "index"})
    assert re.sub(r"(\d\.\d\d)\d*", r"\1", capsys.readouterr().out) == re.sub(r"(\d\.\d\d)\d*", r"\1", shown)

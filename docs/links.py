"""Looks at built pages: `python docs/links.py docs/_build/html`. Exits with 1 if something is wrong.

Every link to a page or a place in one leads somewhere, every image is there and has a text instead, and every link to
elsewhere is well formed; `sphinx-build -b linkcheck docs OUT` follows those.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """What a page refers to, and what can be referred to in it."""

    def __init__(self, path: Path):
        super().__init__()
        self.names: set[str] = set()
        self.targets: list[str] = []
        self.silent: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        """One element."""
        found = dict(attrs)
        self.names |= {found[key] for key in ("id", "name") if found.get(key)}
        self.targets += [found[key] for key in ("href", "src") if found.get(key)]
        if tag == "img" and (not found.get("alt") or found["alt"].endswith((".png", ".svg"))):
            self.silent.append(found.get("src") or "")


def faults(folder: Path) -> list[str]:
    """What is wrong with the pages of a folder, in a line each."""
    pages = {path.resolve(): Page(path) for path in sorted(folder.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(folder.resolve())
        found += [f"{where}: the image {source} has no alt text" for source in page.silent]
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if parts.scheme not in ("https", "http", "mailto", "data") or re.search(r"\s", target):
                    found.append(f"{where}: {target} is not well formed")
                continue
            aim = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not aim.exists():
                found.append(f"{where}: {target} is not there")
            elif parts.fragment and aim in pages and unquote(parts.fragment) not in pages[aim].names:
                found.append(f"{where}: {target} has no such place")
    return found


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]))
    print("\n".join(wrong) or "every link leads somewhere")
    sys.exit(bool(wrong))

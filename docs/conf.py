"""Sphinx configuration: `make docs`."""

import base64
import concurrent.futures
import os
import shutil
import time
from pathlib import Path

import nbclient
import nbformat

project = "jaxbound"
author = copyright = "the jaxbound authors"
extensions = [
    "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.intersphinx",
    "sphinx_copybutton", "sphinx_design", "sphinx-mathjax-offline",
]  # fmt: skip
html_theme = "furo"
html_title = "jaxbound"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
suppress_warnings = ["mystnb.unknown_mime_type"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Links into other projects' pages need the network: JAXBOUND_DOCS_ONLINE=1 make docs.
intersphinx_mapping = {}
if os.environ.get("JAXBOUND_DOCS_ONLINE"):
    intersphinx_mapping = {
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/stable", None),
        "optax": ("https://optax.readthedocs.io/en/stable", None),
    }

# Notebooks are kept without outputs, outside of docs/: they are copied in, and run when the pages are built.
nb_execution_mode = "auto"

_docs = Path(__file__).resolve().parent
_generated = _docs / "_generated"
_generated.mkdir(exist_ok=True)
for _notebook in (_docs.parent / "notebooks").glob("*.ipynb"):
    shutil.copy2(_notebook, _generated)
# Compiling is most of what notebooks do: what one has compiled serves the others, and the next build.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_docs / "_build" / "xla"))


_NO_PICTURE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def _execute(path: Path) -> None:
    """Run a notebook in a kernel of its own, and keep its outputs."""
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}).execute()
    for cell in notebook.cells:
        if text := cell.metadata.get("alt"):
            cell.metadata["mystnb"] = {"image": {"alt": text}}
    nbformat.write(notebook, path)
    print(f"{path.name}: executed in {time.monotonic() - start:.0f} seconds", flush=True)


def _execute_all(_app, config) -> None:
    """Two notebooks at a time, the longest first."""
    longest = ("certify", "beyond_mlps")
    paths = sorted(_generated.glob("*.ipynb"), key=lambda path: path.stem not in longest)
    if config.nb_execution_mode != "off":
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(_execute, paths))
        config.nb_execution_mode = "off"  # done
    for path in paths:
        path.with_suffix(".png").write_bytes(_picture(path))


def _picture(path: Path) -> bytes:
    """The first figure of a notebook, for the gallery; an empty one if it was not executed."""
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    figures = (output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {}))
    found = next(figures, None)
    return base64.b64decode(found) if found else _NO_PICTURE


def _with_source(app) -> list:
    """Only modules whose source is there are listed with it."""
    modules = getattr(app.env, "_viewcode_modules", {})
    for name in [name for name, entry in modules.items() if not entry]:
        del modules[name]
    return []


def _tidied(_app, what, _name, _obj, _options, lines) -> None:
    """Fields of named tuples without Python's own words; indented formulas of modules as they are written."""
    lines[:] = [line for line in lines if not line.startswith("Alias for field number")]
    for place, line in enumerate(lines[:-2] if what == "module" else []):
        if line.endswith(":") and not lines[place + 1] and lines[place + 2].startswith("    "):
            lines[place] = f"{line}:"


def setup(app) -> None:
    """What Sphinx calls."""
    app.connect("config-inited", _execute_all)
    app.connect("html-collect-pages", _with_source, priority=100)
    app.connect("autodoc-process-docstring", _tidied)

"""Sphinx configuration: `make docs`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

project = "jaxbound"
author = copyright = "the jaxbound authors"
extensions = [
    "myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx.ext.intersphinx",
    "sphinx_copybutton", "sphinx_design",
]  # fmt: skip
html_theme = "furo"
html_title = "jaxbound"
html_static_path = ["_static"]
html_css_files = ["wide_tables.css"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
suppress_warnings = ["mystnb.unknown_mime_type"]
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
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
nb_execution_timeout = 300
nb_execution_raise_on_error = True

_docs = Path(__file__).resolve().parent
_generated = _docs / "_generated"
_generated.mkdir(exist_ok=True)
for _notebook in (_docs.parent / "notebooks").glob("*.ipynb"):
    shutil.copy2(_notebook, _generated)
if not (_generated / "certified.svg").exists():
    subprocess.run([sys.executable, str(_docs / "figure.py"), str(_generated / "certified.svg")], check=True)

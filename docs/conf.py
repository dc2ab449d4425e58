"""Sphinx configuration: `make docs`."""

import shutil
from pathlib import Path

project = "jaxbound"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
myst_enable_extensions = ["dollarmath"]
exclude_patterns = ["_build"]

# Notebooks are kept without outputs, outside of docs/: they are copied in, and run when the pages are built.
nb_execution_mode = "auto"
nb_execution_timeout = 300
nb_execution_raise_on_error = True

_root = Path(__file__).resolve().parent
(_root / "_generated").mkdir(exist_ok=True)
for _notebook in (_root.parent / "notebooks").glob("*.ipynb"):
    shutil.copy2(_notebook, _root / "_generated")

"""The notebooks: each .py and its .ipynb hold the same cells, and run from the first to the last one in a fresh kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted({path.stem for kind in ("py", "ipynb") for path in (ROOT / "notebooks").glob(f"*.{kind}")})


def cells(notebook) -> list[tuple[str, str, dict]]:
    """What a pair shares; a cell's id is the .ipynb's own."""
    return [(cell.cell_type, cell.source, dict(cell.metadata)) for cell in notebook.cells]


def test_there_are_notebooks():
    assert "certify" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_in_sync(name):
    import jupytext  # here, because the fast subset is collected where only the core is installed
    import nbformat

    script = jupytext.read(ROOT / "notebooks" / f"{name}.py")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    again = f"make it again: jupytext --update --to ipynb notebooks/{name}.py"
    assert cells(script) == cells(notebook), again
    assert script.metadata.kernelspec == notebook.metadata.kernelspec, again
    assert script.metadata.jupytext.formats == notebook.metadata.jupytext.formats == "ipynb,py:percent"
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs") and cell.get("execution_count") is None, "notebooks are kept without outputs"


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_run(name, tmp_path):
    """What the docs' readers see is what this runs, so a word on the standard error is a failure too."""
    import nbclient
    import nbformat

    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    environment |= {"PYTHONPATH": path, "IPYTHONDIR": str(tmp_path)}
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        said = [output.text for output in outputs if output.get("name") == "stderr"]
        assert not said, f"{cell.source}\n{said}"
        if "plt.subplots" in cell.source:
            assert any("image/png" in output.get("data", {}) for output in outputs), cell.source
    printed = "".join(output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output)
    assert "False" not in printed, "a notebook prints whether what it says is so"

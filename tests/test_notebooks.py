"""The notebooks run from top to bottom on the bundled model, and show what they set out to show.

They are kept without outputs, so what a reader sees is what this test has seen happen.
"""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))

SHOWS = re.compile(r"^(plt\.show|sheet)\(", re.MULTILINE)
"""Such a line, not inside a function, puts a picture on the page."""


EXPECTED: dict[str, tuple[int, tuple[str, ...], dict[str, Any]]] = {
    "01_draw": (
        8,
        ("the same latents as by hand: True",),
        {"STEPS": 6, "FEWER": 3, "COUNTS": [1, 2, 4], "LONG": 6},
    ),
    "02_lora": (
        2,
        ("at weight 0 the pictures are the model's own, bit for bit: True", "errors"),
        {"STEPS": 4, "ORDINARY": 4, "DRAWN_IN": 4},
    ),
    "03_few_steps": (
        2,
        ("without the flag the pictures are as before, bit for bit: True", "50 pairs"),
        {"STEPS": 4, "MANY": 10},
    ),
}
"""How many cells of a notebook show pictures, at least; what it prints; and what its cell of
parameters says here, so that it takes no longer than a test should."""


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Any:
    """Each notebook as it lies in the folder."""
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cell: Any) -> list[np.ndarray]:
    """The pictures that a cell put out, each [H, W, 3]."""
    found = [output.get("data", {}).get("image/png") for output in cell.outputs]
    decoded = [base64.b64decode(png) for png in found if png]
    return [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for png in decoded]


def printed(cell: Any) -> str:
    return "".join(o.text for o in cell.outputs if o.get("name") == "stdout")


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


def test_a_notebook_is_kept_clean(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None


def shortened(notebook: Any, parameters: dict[str, Any]) -> Any:
    """The notebook with these values in its cell of parameters, which has no others."""
    [cell] = [c for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", [])]
    named = [line.partition(" = ")[0] for line in cell.source.splitlines()]
    assert named == list(parameters)
    cell.source = "\n".join(f"{name} = {value}" for name, value in parameters.items())
    return notebook


def test_a_notebook_runs_and_shows_its_pictures(
    notebook: Any, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No cell fails (nbclient raises), each that should show something does, and it says what it
    sets out to say."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))  # a reader's own start-up files stay out
    monkeypatch.delenv("MPLBACKEND", raising=False)
    where = {"metadata": {"path": str(tmp_path)}}
    shown, says, parameters = EXPECTED[request.node.callspec.params["notebook"].stem]
    NotebookClient(
        shortened(notebook, parameters), kernel_name="python3", timeout=240, resources=where
    ).execute()

    showing = [cell for cell in code_cells(notebook) if SHOWS.search(cell.source)]
    assert len(showing) >= shown
    for cell in showing:
        assert pictures(cell), f"no picture from:\n{cell.source}"
    for cell in code_cells(notebook):
        for picture in pictures(cell):
            assert picture.std() > 1, f"a blank picture from:\n{cell.source}"
    said = "".join(printed(cell) for cell in code_cells(notebook))
    for sentence in says:
        assert sentence in said
    difference = re.search(r"largest difference: (\S+),", said)
    # 1e-5 is what a batch may change by rounding (fp32 latents); the decoder stays in that order.
    assert (difference is not None) == ("01_draw" in str(request.node.name))
    assert difference is None or float(difference[1]) < 1e-4

"""What holds for every saved notebook: small, run from top to bottom, described pictures, mostly
compared outputs.
"""

import base64
import re
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
IGNORE = re.compile(r"^# NBVAL_IGNORE_OUTPUT$", re.MULTILINE)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return request.param, nbformat.read(request.param, as_version=4)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_small_and_without_widget_state(notebook):
    path, content = notebook
    assert path.stat().st_size <= 450_000
    assert set(content.metadata) <= {"kernelspec"}


def test_it_was_run_once_from_top_to_bottom_without_errors(notebook):
    cells = code_cells(notebook[1])
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)


def test_every_picture_is_a_file_with_alt_text(notebook):
    """As PNG or SVG: GitHub shows no picture that stands in HTML."""
    for cell in code_cells(notebook[1]):
        for output in cell.outputs:
            data = output.get("data", {})
            assert "image/jpeg" not in data and "<img" not in data.get("text/html", ""), cell.source
            for kind in {"image/png", "image/svg+xml"} & set(data):
                assert output.metadata.get(kind, {}).get("alt", "").strip(), cell.source


def test_pictures_are_sharp_at_the_width_of_the_page(notebook):
    for cell in code_cells(notebook[1]):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                header = base64.b64decode(output.data["image/png"][:64])
                shown = output.metadata["image/png"]["width"]
                assert shown <= 900 and int.from_bytes(header[16:20], "big") >= 2 * shown


def test_cells_are_short_and_none_is_skipped(notebook):
    for cell in code_cells(notebook[1]):
        assert "NBVAL_SKIP" not in cell.source and "nbval-skip" not in cell.metadata.get("tags", [])
        assert len(cell.source.splitlines()) <= 25, cell.source


def test_most_outputs_are_compared(notebook):
    with_output = [cell for cell in code_cells(notebook[1]) if cell.outputs]
    assert sum(bool(IGNORE.search(cell.source)) for cell in with_output) < len(with_output) / 2

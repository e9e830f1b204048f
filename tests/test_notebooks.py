"""What holds for every saved notebook: small, run from top to bottom, described pictures, mostly
compared outputs.
"""

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
    assert path.stat().st_size <= 400_000
    assert set(content.metadata) <= {"kernelspec"}


def test_it_was_run_once_from_top_to_bottom_without_errors(notebook):
    cells = code_cells(notebook[1])
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(output.output_type != "error" for cell in cells for output in cell.outputs)


def test_every_picture_is_described(notebook):
    for cell in code_cells(notebook[1]):
        for output in cell.outputs:
            data = output.get("data", {})
            assert not {"image/png", "image/jpeg", "image/svg+xml"} & set(data), cell.source
            for tag in re.findall(r"<img [^>]*", data.get("text/html", "")):
                assert re.search(r'alt="[^"]+"', tag), cell.source


def test_cells_are_short_and_none_is_skipped(notebook):
    for cell in code_cells(notebook[1]):
        assert "NBVAL_SKIP" not in cell.source and "nbval-skip" not in cell.metadata.get("tags", [])
        assert len(cell.source.splitlines()) <= 25, cell.source


def test_most_outputs_are_compared(notebook):
    with_output = [cell for cell in code_cells(notebook[1]) if cell.outputs]
    assert sum(bool(IGNORE.search(cell.source)) for cell in with_output) < len(with_output) / 2

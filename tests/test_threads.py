"""Threads: waiting ones sleep, which torch must be told before it is loaded; their number is kept
on resume.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch

from semidetr_lite.errors import UserError
from semidetr_lite.training.loop import Run
from semidetr_lite.training.settings import change, new_config
from tests.test_train import go, small, splits  # noqa: F401

ROOT = Path(__file__).parents[1]
# A finder that writes down what the variable is when torch is asked for, and finds nothing itself.
SPY = """
import os, runpy, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("torch sees", os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
sys.meta_path.insert(0, Spy())
"""


def seen_by_torch(code: str, **variables) -> list[str]:
    """OMP_WAIT_POLICY and GOMP_SPINCOUNT at each import of torch while code runs in a new process."""
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    words = [sys.executable, "-c", SPY + code]
    run = subprocess.run(
        words,
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return [
        line.removeprefix("torch sees ")
        for line in run.stdout.splitlines()
        if line.startswith("torch sees")
    ]


COMMAND = "sys.argv = ['semidetr', 'evaluate', '.']; runpy.run_module('semidetr_lite', run_name='__main__')"


def test_waiting_threads_sleep_before_torch_is_loaded():
    assert set(seen_by_torch(COMMAND)) == {"passive 5000"}


def test_what_the_user_has_set_stays():
    code = "import semidetr_lite.boxes"
    assert set(seen_by_torch(code, OMP_WAIT_POLICY="active")) == {"active None"}
    assert set(seen_by_torch(code, GOMP_SPINCOUNT="7")) == {"passive 7"}


def test_make_tells_its_programs():
    words = ["make", "-s", "--eval", "show: ; @echo $$OMP_WAIT_POLICY", "show"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for given, expected in (({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")):
        run = subprocess.run(
            words, cwd=ROOT, env={**environment, **given}, capture_output=True, text=True
        )
        assert run.stdout.split() == [expected]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_notebooks_import_the_package_before_torch(path):
    """Kernels of other programs than ours are told as well."""
    cells = [
        cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"
    ]
    assert cells[0].splitlines()[0].startswith("import semidetr_lite")


def test_the_number_of_threads_is_chosen_once_and_kept(splits, tmp_path):
    try:
        go(small(threads=2, steps=1), tmp_path / "run", splits)
        torch.set_num_threads(1)
        resumed = Run(None, tmp_path / "run", resume=True, splits=splits, workers=0, quiet=True)
        assert torch.get_num_threads() == 2 == resumed.config.runtime.threads
        torch.set_num_threads(1)
        go(small(steps=1), tmp_path / "other", splits)
        assert (
            json.loads((tmp_path / "other/config.json").read_text())["runtime"]["threads"] == 1
        )  # what torch had
    finally:
        torch.set_num_threads(1)


def test_a_number_of_threads_that_cannot_be(splits, tmp_path):
    with pytest.raises(
        UserError, match="--threads: input should be greater than or equal to 1, got 0"
    ):
        new_config(threads=0)
    with pytest.raises(UserError, match="--threads: input should be a valid integer, got .many"):
        go(change(small(), threads="many"), tmp_path / "run", splits)

"""The compiled kernels of deformable attention against the readable formula."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from semidetr_lite.detectors import deformable, kernels
from semidetr_lite.detectors.kernels import operators
from semidetr_lite.detectors.kernels.embedding_bag_attention import embedding_bag_attention
from tests.test_deformable import some_inputs

ROOT = Path(__file__).parents[1]
INTERPRETED = "TRITON_INTERPRET" in os.environ  # Triton then runs its kernels in NumPy
needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba is not installed"
)


def formula(value, shapes, locations, weights):
    """`deformable_attention` without a kernel."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deformable, "select_kernel", lambda *_: None)
        return deformable.deformable_attention(value, shapes, locations, weights)


def with_gradients(read, shapes, *tensors) -> list[torch.Tensor]:
    """The result and the gradients of value, locations and weights."""
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    output = read(inputs[0], shapes, *inputs[1:])
    upstream = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]


def agree(found: list, expected: list, tolerance: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        scale = max(float(theirs.abs().max()), 1.0) if theirs.numel() else 1.0
        assert torch.allclose(ours, theirs, rtol=0, atol=tolerance * scale)


# ---- the CPU kernel ------------------------------------------------------------------------------


@needs_numba
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [1, 5, 16, 32])
def test_the_cpu_kernel_equals_the_formula(dtype, depth):
    """Maps of one cell, points beyond the borders, head widths that are no power of two."""
    shapes = [(4, 6), (3, 2), (1, 1)]
    value, _, locations, weights = some_inputs(dtype, 2, 37, 3, 5, depth, shapes)
    tensors = (value, locations * 1.6 - 0.3, weights)
    assert kernels.select_kernel(*tensors[:2]) is operators.attention_operator
    expected = with_gradients(formula, shapes, *tensors)
    found = with_gradients(deformable.deformable_attention, shapes, *tensors)
    assert all(each.abs().max() > 0.1 for each in expected)
    agree(found, expected, 3e-6 if dtype == torch.float32 else 1e-12)


@needs_numba
def test_on_and_beyond_the_borders():
    """Whole cells, edges and corners of the map: the gradients there are one-sided, as in torch."""
    shapes = [(2, 4)]
    sides = torch.tensor([-0.3, -0.125, 0.0, 0.125, 0.5, 0.875, 1.0, 1.125, 1.3])
    grid = torch.cartesian_prod(sides, sides).view(1, -1, 1, 1, 1, 2).double()
    value = torch.randn(1, 8, 1, 3, dtype=torch.float64)
    tensors = (value, grid, torch.ones(grid.shape[:-1], dtype=torch.float64))
    agree(
        with_gradients(deformable.deformable_attention, shapes, *tensors),
        with_gradients(formula, shapes, *tensors),
        1e-12,
    )


@needs_numba
@pytest.mark.parametrize("batch, queries", [(2, 0), (0, 4)])
def test_no_queries_or_no_images(batch, queries):
    shapes = [(6, 9), (4, 3), (1, 2)]
    value, _, locations, weights = some_inputs(batch=batch, queries=queries)
    found = with_gradients(deformable.deformable_attention, shapes, value, locations, weights)
    assert found[0].shape == (batch, queries, 15)
    assert (found[1] == 0).all()


@needs_numba
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_locations_that_are_not_finite_stay_visible(bad):
    shapes = [(6, 9), (4, 3), (1, 2)]
    value, _, locations, weights = some_inputs()
    locations[0, 1, 2, 0, 1, 0] = bad
    locations[1, 3, 0, 2, 0, 1] = bad
    output, *gradients = with_gradients(
        deformable.deformable_attention, shapes, value, locations, weights
    )
    heads = output.view(2, 4, 3, 5)
    spoilt = torch.zeros(2, 4, 3, dtype=torch.bool)
    spoilt[0, 1, 2] = spoilt[1, 3, 0] = True
    assert heads[spoilt].isnan().all() and heads[~spoilt].isfinite().all()
    assert gradients[1][0, 1, 2, 0, 1].isnan().all() and gradients[0].isfinite().all()


@needs_numba
def test_huge_locations_and_weights_read_nothing_outside():
    shapes = [(6, 9), (4, 3), (1, 2)]
    value, _, locations, weights = some_inputs()
    for far in (1e9, -1e9, 1e30, -1e30):
        output = deformable.deformable_attention(value, shapes, locations * 0 + far, weights)
        assert (output == 0).all()
    weights[0, 0, 0] = torch.nan
    far = deformable.deformable_attention(value, shapes, locations * 0 + 7, weights)
    assert far.view(2, 4, 3, 5)[0, 0, 0].isnan().all() and far.isnan().sum() == 5


@needs_numba
def test_bits_are_the_same_again_and_with_any_number_of_threads(monkeypatch):
    """Exact resume rests on this. Five images of three heads: no equal shares for two threads."""
    from semidetr_lite.detectors.kernels import cpu_attention

    monkeypatch.setattr(cpu_attention, "ONE_THREAD_BELOW", 0)
    started = []
    thread = cpu_attention.threading.Thread
    monkeypatch.setattr(
        cpu_attention.threading, "Thread", lambda **how: started.append(how) or thread(**how)
    )
    value, shapes, locations, weights = some_inputs(batch=5, queries=60, depth=16)
    found = []
    try:
        for count in (1, 1, 2, 4):
            torch.set_num_threads(count)
            how = (deformable.deformable_attention, shapes, value, locations, weights)
            found.append(with_gradients(*how))
            assert len(started) == 2 * (count - 1)  # forward and backward
            started.clear()
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@needs_numba
def test_values_of_lower_precision_are_computed_like_locations():
    value, shapes, locations, weights = some_inputs(depth=16)
    tensors = (value.bfloat16(), locations, weights.bfloat16())
    found = with_gradients(deformable.deformable_attention, shapes, *tensors)
    expected = with_gradients(formula, shapes, *tensors)
    assert [each.dtype for each in found[1:]] == [each.dtype for each in tensors]
    assert all(torch.allclose(a.float(), b.float(), atol=0.05) for a, b in zip(found, expected))


def test_without_numba_the_formula_serves(monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    kernels._try_kernel.cache_clear()
    value, shapes, locations, weights = some_inputs()
    try:
        assert kernels.select_kernel(value, locations) is None
        with torch.no_grad():
            assert kernels.select_kernel(value, locations) is embedding_bag_attention
    finally:
        kernels._try_kernel.cache_clear()


def test_where_numba_cannot_compile_there_is_a_warning_and_no_kernel(monkeypatch):
    def broken(device):
        raise ImportError("needs another NumPy")

    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(operators, "_kernels", broken)
    with pytest.warns(UserWarning, match="numba cannot build its kernel.*another NumPy"):
        assert not kernels._try_kernel.__wrapped__("cpu")


PROGRAM = """
import os, sys, torch
from semidetr_lite.detectors import deformable, kernels
from tests.test_kernels import formula, some_inputs
assert "numba" not in sys.modules
torch.manual_seed(0)
value, shapes, locations, weights = some_inputs(batch=3, queries=50, depth=32)
value.requires_grad_()
torch.set_num_threads(2)
deformable.deformable_attention(value, shapes, locations, weights).sum().backward()
assert "numba" in sys.modules and kernels.can_compile("cpu")
class Reads(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return deformable.deformable_attention(value.detach(), shapes, locations, weights)
loader = torch.utils.data.DataLoader(Reads(), batch_size=None, num_workers=2,
                                     multiprocessing_context="fork")
expected = formula(value.detach(), shapes, locations, weights)
for read in loader:
    assert torch.allclose(read, expected, atol=1e-5)
print("agree")
"""


@needs_numba
@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not fork")
@pytest.mark.parametrize("how", ["generic processor", "no folder for a cache"])
def test_in_a_new_process_and_in_its_forked_workers(tmp_path, how):
    variables, folder = {"PYTHONDONTWRITEBYTECODE": "1"}, ROOT
    if how == "generic processor":
        variables |= {"NUMBA_CPU_NAME": "generic", "NUMBA_CACHE_DIR": str(tmp_path)}
    else:  # a file where each folder for a cache would be
        folder = tmp_path / "read-only"
        ignore = shutil.ignore_patterns("__pycache__")
        for name in ("semidetr_lite", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        (folder / "semidetr_lite/detectors/kernels/__pycache__").write_text("")
        (tmp_path / "home").write_text("")
        variables |= {name: str(tmp_path / "home") for name in ("HOME", "XDG_CACHE_HOME")}
        variables |= {"NUMBA_CACHE_DIR": str(tmp_path / "home")}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0 and ran.stdout.strip() == "agree", ran.stdout + ran.stderr


# ---- the operator --------------------------------------------------------------------------------


@needs_numba
def test_the_operators_keep_the_rules_of_torch():
    value, shapes, locations, weights = some_inputs(depth=4)
    sides = [side for shape in shapes for side in shape]
    tensors = [each.requires_grad_() for each in (value, locations, weights)]
    torch.library.opcheck(operators.attention, (tensors[0], sides, *tensors[1:]))
    grad = torch.randn(2, 4, 12)
    plain = [each.detach() for each in tensors]
    utilities = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        operators.attention_backward, (plain[0], sides, *plain[1:], grad), test_utils=utilities
    )


@needs_numba
def test_a_compiled_detector_keeps_the_operator():
    """torch.compile sees one graph, with the operator in it, forward and backward."""
    from torch._dynamo.backends.common import aot_autograd

    seen = {"forward": [], "backward": []}

    def noted(kind):
        def keep(graph, inputs):
            seen[kind] += [str(node.target) for node in graph.graph.nodes]
            return graph

        return keep

    backend = aot_autograd(fw_compiler=noted("forward"), bw_compiler=noted("backward"))
    torch._dynamo.reset()
    kernels._try_kernel.cache_clear()  # the first question comes from inside torch.compile
    value, shapes, locations, weights = some_inputs(depth=4)
    compiled = torch.compile(deformable.deformable_attention, backend=backend, fullgraph=True)
    found = with_gradients(compiled, shapes, value, locations, weights)
    expected = with_gradients(formula, shapes, value, locations, weights)
    agree(found, expected, 3e-6)
    assert seen["forward"].count("semidetr_lite.deformable_attention.default") == 1
    assert seen["backward"].count("semidetr_lite.deformable_attention_backward.default") == 1


# ---- the GPU kernel ------------------------------------------------------------------------------


@pytest.mark.skipif(
    not (torch.cuda.is_available() or INTERPRETED), reason="Triton's kernels need a GPU"
)
@pytest.mark.parametrize("points", [1, 3])
def test_the_gpu_kernel_equals_the_formula(points, monkeypatch):
    from semidetr_lite.detectors.kernels import triton_attention

    monkeypatch.setattr(operators, "_kernels", lambda device: triton_attention)
    device = "cpu" if INTERPRETED else "cuda"
    sizes = [(4, 6), (3, 2), (1, 1)]  # not square, and 37 queries are no multiple of a program's
    value, shapes, locations, weights = some_inputs(torch.float32, 2, 37, 3, points, 8, sizes)
    tensors = [each.to(device) for each in (value, locations * 1.4 - 0.2, weights)]
    expected = with_gradients(formula, shapes, *tensors)
    assert all(each.abs().max() > 0.1 for each in expected)
    agree(with_gradients(operators.attention_operator, shapes, *tensors), expected, 1e-4)
    rough = operators.attention_operator(tensors[0].bfloat16(), shapes, *tensors[1:])
    assert rough.dtype == torch.bfloat16 and torch.allclose(rough.float(), expected[0], atol=0.1)
    none = [tensors[0], tensors[1][:, :0], tensors[2][:, :0]]  # no queries
    output, value_grad, *_ = with_gradients(operators.attention_operator, shapes, *none)
    assert output.shape == (2, 0, 24) and (value_grad == 0).all()


@pytest.mark.skipif(INTERPRETED, reason="is what starts the interpreter")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="torch came without Triton")
@pytest.mark.skipif(
    torch.__version__ < "2.6" and np.__version__ >= "2",
    reason="the interpreter of torch 2.5's Triton needs NumPy 1",
)
def test_the_gpu_kernel_without_a_gpu():
    """The test above in Triton's interpreter, which is chosen when the kernels are imported."""
    options = ["-q", "-p", "no:cacheprovider", __file__, "-k", "gpu_kernel_equals"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0 and "2 passed" in ended.stdout, ended.stdout + ended.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a kernel can be built here")
def test_where_triton_cannot_build_its_kernel_there_is_a_warning_and_no_kernel():
    with pytest.warns(UserWarning, match="Triton cannot build its kernel"):
        assert not kernels._try_kernel.__wrapped__("cuda")

"""The same for every test: seeded, one thread (two processes run the tests), no window for figures."""

import os

os.environ["MPLBACKEND"] = "Agg"  # before anything imports matplotlib
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before anything imports torch
os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

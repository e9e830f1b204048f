"""The same for every test: seeded, at most two threads, no window for figures."""

import os

os.environ["MPLBACKEND"] = "Agg"  # before anything imports matplotlib

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)

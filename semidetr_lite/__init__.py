"""A teaching and reproduction kit for Semi-DETR: semi-supervised detection transformers."""

import os

# Torch reads these when it is loaded, so they stand before anything else. Threads that wait for
# work spin for some microseconds and then sleep. Spinning on makes a training step many times
# slower beside other jobs, sleeping at once makes it slower on a quiet machine
# (benchmarks/README.md).
if os.environ.setdefault("OMP_WAIT_POLICY", "passive") == "passive":
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

__all__ = ["load_detector"]
__version__ = "0.1.0"


def __getattr__(name: str):
    """`load_detector`, imported when it is asked for: torch takes seconds."""
    if name == "load_detector":
        from semidetr_lite.training.checkpoint import load_detector

        return load_detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""A teaching and reproduction kit for Semi-DETR: semi-supervised detection transformers."""

import os

# Threads that wait for work sleep instead of spinning. Torch reads this when it is loaded, so it
# stands before anything
# else; beside other jobs, spinning threads make a training step many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__all__ = ["load_detector"]
__version__ = "0.1.0"


def __getattr__(name: str):
    """`load_detector`, imported when it is asked for: torch takes seconds."""
    if name == "load_detector":
        from semidetr_lite.training.checkpoint import load_detector

        return load_detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""semidetr-lite: a teaching and reproduction kit for Semi-DETR, semi-supervised object detection with detection
transformers.
"""

from semidetr_lite.training.checkpoint import load_detector

__all__ = ["load_detector"]
__version__ = "0.1.0"

"""`semidetr export`: a detector as an ONNX file, which runs without this package.

| name | shape | what it is |
|---|---|---|
| `image` | (1, 3, H, W) | RGB as floats in 0..1, of any size from 64 to 4,096 pixels |
| `scores` | (1, Q, C) | of each query and class, in 0..1 |
| `boxes` | (1, Q, 4) | x1, y1, x2, y2 of each query, as fractions of width and height |

Mean and standard deviation are inside. Left outside are: reading and turning the image, resizing it
to the size of training, choosing the best scores, and non-maximum suppression where the weights
need it. The file's metadata say what those need: `categories` (names in the order of C),
`short_side` and `long_side` (pixels, absent for images at their own size), `nms` (an IoU, absent
for none).
"""

import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import nn

from semidetr_lite.boxes import to_pixels
from semidetr_lite.detectors import deformable
from semidetr_lite.detectors.deformable import DeformableDetector
from semidetr_lite.detectors.detector import Detector, class_scores
from semidetr_lite.errors import UserError
from semidetr_lite.files import write_atomic

SIDES = (64, 4096)  # pixels
TRACED = (96, 128)  # (H, W) of the image that the trace is made with
TOLERANCE = 1e-3  # largest difference of a score or of a box in fractions of the image
NEEDED = "pip install onnx onnxruntime onnxscript"


class OnnxDetector(nn.Module):
    """A detector for one image of any size: image (1, 3, H, W) -> scores and boxes."""

    def __init__(self, detector: Detector):
        super().__init__()
        self.detector = detector

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores (1, Q, C) and boxes (1, Q, 4) xyxy in fractions of the image."""
        outputs = self.detector(image)
        return class_scores(outputs), to_pixels(outputs["pred_boxes"], torch.ones(1, 2))


def export_onnx(detector: Detector, path: Path) -> float | None:
    """Write a detector as an ONNX file and compare the two on images of mixed sizes.

    Args:
        detector: DINO or Deformable DETR, with `.categories`.
        path: the .onnx file.

    Returns:
        The largest difference of a score or box; None where onnxruntime is not installed.

    Raises UserError for another detector, without the packages, and for a file that differs.
    """
    if not isinstance(detector, DeformableDetector):
        name = type(detector).__name__
        raise UserError(f"{name} cannot be exported: dino and deformable-detr can")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as problem:
        raise UserError(f"export needs packages that are not here ({problem}): {NEEDED}") from None
    model = OnnxDetector(detector.cpu()).eval()
    program = _onnx_program(model)
    program.model.metadata_props.update(_metadata(detector))
    write_atomic(path, lambda temporary: program.save(temporary))
    try:
        import onnxruntime
    except ImportError:
        return None
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    difference = largest_difference(model, session)
    if not difference <= TOLERANCE:
        fault = f"its results differ from the detector's by {difference:g}"
        raise UserError(f"{path}: {fault}; do not use it, and report it with the versions of torch")
    return difference


def _onnx_program(model: OnnxDetector):
    """The model as torch's ONNXProgram, height and width left free."""
    image = torch.rand(1, 3, *TRACED)
    height, width = (
        torch.export.Dim(name, min=SIDES[0], max=SIDES[1]) for name in ("height", "width")
    )
    sides = {"image": {2: height, 3: width}}
    logging.disable(logging.WARNING)  # torch's remarks on its own conversion
    try:
        with warnings.catch_warnings(), traceable(model.detector), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (image,), dynamic_shapes=sides, strict=False)
            return torch.onnx.export(
                program,
                dynamo=True,
                opset_version=20,
                input_names=["image"],
                output_names=["scores", "boxes"],
                verbose=False,
            )
    except Exception as problem:  # of torch's conversion, which changes with every version
        reason = (str(problem).splitlines() or [""])[0][:200]
        fault = f"torch {torch.__version__} cannot export this detector"
        raise UserError(f"{fault}: {reason}") from problem
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def traceable(detector: Detector) -> Iterator[None]:
    """While inside, what needs sizes as numbers is done in forms that a trace can follow.

    Images are one of one size, nothing is padded, attention samples level by level.
    """

    def extract_features(images: list[torch.Tensor]) -> tuple[list, list, bool]:
        maps = detector._project(torch.stack(list(images)))
        masks = [level.new_zeros(1, *level.shape[-2:], dtype=torch.bool) for level in maps]
        return maps, masks, False

    before = deformable.level_layout, deformable.select_kernel
    detector.__dict__["extract_features"] = extract_features
    deformable.level_layout, deformable.select_kernel = _level_layout, lambda *_: None
    try:
        yield
    finally:
        deformable.level_layout, deformable.select_kernel = before
        del detector.__dict__["extract_features"]


def _level_layout(shapes: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """As transformer.level_layout: (L, 3), width, height and first token of each level."""
    rows, start = [], 0
    for height, width in shapes:
        numbers = [torch.full((), value, device=device) for value in (width, height, start)]
        rows.append(torch.stack(numbers))
        start = start + height * width
    return torch.stack(rows)


def _metadata(detector: Detector) -> dict[str, str]:
    values: dict = {"categories": [row["name"] for row in detector.categories]}
    if detector.test_size is not None:
        values["short_side"], values["long_side"] = detector.test_size
    if detector.nms is not None:
        values["nms"] = detector.nms
    return {key: json.dumps(value) for key, value in values.items()}


def largest_difference(model: OnnxDetector, session) -> float:
    """The largest difference of scores and boxes on random images of mixed sizes.

    Args:
        model: what was exported.
        session: onnxruntime's InferenceSession.
    """
    generator = torch.Generator().manual_seed(0)
    found = 0.0
    for size in ((96, 128), (128, 96), (160, 160), (75, 101)):
        image = torch.rand(1, 3, *size, generator=generator)
        with torch.no_grad():
            expected = model(image)
        outputs = session.run(["scores", "boxes"], {"image": image.numpy()})
        for ours, theirs in zip(expected, outputs):
            found = max(found, float(np.abs(ours.numpy() - theirs).max()))
    return found


def outside_lines(detector: Detector) -> list[str]:
    """What whoever uses the file has to do, a line each."""
    lines = ["image: RGB floats in 0..1, (1, 3, H, W), turned upright"]
    if detector.test_size is not None:
        short, long = detector.test_size
        lines.append(f"resize it first: short side {short} pixels, long side at most {long}")
    lines.append("scores (1, Q, C) and boxes (1, Q, 4), x1 y1 x2 y2 in fractions of the image")
    if detector.nms is not None:
        lines.append(
            f"non-maximum suppression per class at IoU {detector.nms:g}: these weights need it"
        )
    return lines

"""What `detect` takes: every form of an image gives the same boxes, and no range is guessed."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from semidetr_lite.detectors.detector import PIXELS_AT_ONCE, same_size_chunks
from semidetr_lite.detectors.inputs import load_image
from semidetr_lite.errors import UserError
from tests.test_detector import same, small

TURN = 0x0112  # EXIF's orientation


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def saved(picture: Image.Image, **saving) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", **saving)
    return file.getvalue()


def test_every_form_of_an_image_gives_the_same_boxes(pixels, tmp_path):
    content = saved(Image.fromarray(pixels))
    (tmp_path / "a.png").write_bytes(content)
    transparent = np.dstack([pixels, np.full((48, 64), 9, dtype=np.uint8)])
    detector = small()
    expected = detector.detect(tmp_path / "a.png")[0]
    forms = [content, bytearray(content), io.BytesIO(content), pixels, pixels.astype(np.int64)]
    forms += [pixels.astype(np.uint16), transparent, pixels / 255, (pixels / 255).astype("f4")]
    forms += [torch.from_numpy(pixels).permute(2, 0, 1).int()]
    for form in forms:
        assert same(detector.detect(form)[0], expected)
    with open(tmp_path / "a.png", "rb") as file:
        assert same(detector.detect(file)[0], expected)
    together = detector.detect([pixels, content, torch.from_numpy(pixels).permute(2, 0, 1)])
    assert len(together) == 3 and all(same(found, expected) for found in together)
    assert len(detector.detect(np.stack([pixels] * 2))) == 2


def test_a_grey_array_has_three_equal_channels(pixels):
    tensor = load_image(pixels[:, :, 0])
    assert tensor.shape == (3, 48, 64) and (tensor == torch.from_numpy(pixels[:, :, 0])).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_upright_in_every_form(pixels, tmp_path, orientation):
    exif = Image.Exif()
    exif[TURN] = orientation
    content = saved(Image.fromarray(pixels), exif=exif)
    (tmp_path / "a.png").write_bytes(content)
    by_path = load_image(tmp_path / "a.png")
    assert by_path.shape == ((3, 64, 48) if orientation >= 5 else (3, 48, 64))
    with Image.open(tmp_path / "a.png") as picture:
        assert torch.equal(load_image(picture), by_path)
    assert torch.equal(load_image(content), by_path)
    if orientation == 6:  # the camera was turned to the right
        assert torch.equal(by_path, torch.from_numpy(np.rot90(pixels, -1).copy()).permute(2, 0, 1))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.full((4, 5, 3), 255.0), ["0 to 255", "divide it by 255"][1:]),
        (torch.full((3, 4, 5), 200.0), ["divide it by 255"]),
        (torch.full((3, 4, 5), -2.0), ["-2", "bring it to 0..1"]),
        (torch.full((3, 4, 5), torch.nan), ["nan"]),
        (np.full((4, 5, 3), 60_000, dtype=np.uint16), ["60000", "uint8 in 0..255"]),
        (np.zeros((4, 5, 3), dtype=bool), ["bool"]),
        (np.zeros((3, 4, 5), dtype=np.uint8), ["(3, 4, 5)", "transpose"]),
        (np.zeros((4, 5, 3), dtype=object), ["objects"]),
        (b"no picture", ["the bytes given: not a readable image"]),
        (io.BytesIO(b"no picture"), ["the file given: not a readable image"]),
        ([None], ["a NoneType is no image"]),
        ([{"boxes": 1}], ["a dict is no image"]),
        (Image.fromarray(np.zeros((4, 5), dtype=np.uint16)), ["8 bits per channel"]),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(image, words):
    with pytest.raises(UserError) as problem:
        small().detect(image)
    message = str(problem.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_rounding_beyond_the_range_is_no_fault():
    image = torch.rand(3, 8, 9)
    image[0, 0, 0], image[0, 0, 1] = 1 + 1e-4, -1e-4
    assert torch.equal(load_image(image), image)


def test_large_images_run_in_smaller_chunks():
    images = [torch.zeros(1).expand(3, 800, 1067)] * 12 + [torch.zeros(1).expand(3, 9000, 900)] * 2
    chunks = same_size_chunks(images, 50, PIXELS_AT_ONCE)
    assert [len(chunk) for chunk in chunks] == [4, 4, 4, 1, 1]
    assert sorted(index for chunk in chunks for index in chunk) == list(range(14))

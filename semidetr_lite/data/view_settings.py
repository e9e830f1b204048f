"""How far the views of an image may go. Without torch, so that the commands start quickly."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from semidetr_lite.fields import Count, Fraction, Range, WholeNumber, option_group

WeakZoom = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, le=1)]]
Degrees = Annotated[float, Field(ge=0, lt=90)]


@dataclass(frozen=True)
@option_group
class ViewSettings:
    """Weak, strong and labelled views.

    Fractions are of the image's side; ranges go both ways unless they are pairs.
    """

    # pixels; one is drawn and the image resized to it; empty: images keep their size
    short_sides: tuple[Count, ...] = ()
    long_side: Count = 1333  # pixels, at most, of a resized image
    flip: bool = True  # whether views may be mirrored; --no-flip for letters and digits
    # of the student's views, about the centre, on the same canvas, log-uniform
    zoom: Range = (1.0, 1.0)
    shift: Fraction = 0.0  # of the student's views
    # of the teacher's view; at most 1: what the teacher cannot see would be background to the
    # student
    weak_zoom: WeakZoom = (1.0, 1.0)
    strong_zoom: Range | None = None  # of the strong view, if it is not `zoom`
    strong_shift: Fraction = 0.1  # of the strong view
    strong_rotation: Degrees = 30.0  # degrees, of the strong view
    strong_shear: Degrees = 30.0  # degrees, of the strong view
    patches: WholeNumber = 4  # at most so many erased patches in the strong view
    patch_side: Fraction = 0.2  # of an erased patch, at most
    visible: Fraction = 0.25  # a box of which less remains in the view is dropped
    # shear about the corner and by the hyperbolic tangent of the angle, not the centre and tangent
    released_shear: bool = False
    # every second labelled view shows a random part of its image (DETR's recipe)
    detr_crops: bool = False
    labelled_color: bool = True  # whether labelled views get a colour operation
    # of strong views with each other; both: the one or the other
    mixing: Literal["none", "mixup", "mosaic", "both"] = "none"
    mixing_share: Fraction = 0.5  # of the strong views that are mixed

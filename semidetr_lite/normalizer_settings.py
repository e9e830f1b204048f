"""What losses are divided by. Without torch, so that the commands start quickly."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from semidetr_lite.fields import Count, option_group


@dataclass(frozen=True)
@option_group
class NormalizerSettings:
    """What the losses of a step are divided by."""

    # of the images of a step: each group divides its class losses by its own number of boxes, as
    # each GPU of the released code does
    normalizer_groups: Count = 1
    # least number that losses of the whole step are divided by; as released: normalizer_groups
    normalizer_bound: Annotated[float, Field(gt=0)] = 1.0
    # least number that class losses on unlabelled images are divided by: expected_objects counts
    # as many objects per image as labelled images have
    pseudo_normalizer: Literal["pseudo_boxes", "expected_objects"] = "pseudo_boxes"

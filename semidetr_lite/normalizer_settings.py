"""What losses are divided by. Without torch, so that the commands start quickly."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from semidetr_lite.fields import Count, option_group


@dataclass(frozen=True)
@option_group
class NormalizerSettings:
    """What the losses of a step are divided by."""

    # of a step's images; each divides its class losses by its own boxes, as a released GPU does
    normalizer_groups: Count = 1
    # least number that losses of a whole step are divided by; as released: the number of groups
    normalizer_bound: Annotated[float, Field(gt=0)] = 1.0
    # bound of class losses on unlabelled images; or the objects that labelled ones make expect
    pseudo_normalizer: Literal["pseudo_boxes", "expected_objects"] = "pseudo_boxes"

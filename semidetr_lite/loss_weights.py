"""Factors of the losses. Without torch, so that the commands start quickly."""

from dataclasses import dataclass

from semidetr_lite.fields import Weight, option_group


@dataclass(frozen=True)
@option_group
class LossWeights:
    """Factors of the three losses. The matching cost keeps 2, 5 and 2."""

    class_weight: Weight = 2.0  # of the classification loss
    l1_weight: Weight = 5.0  # of the L1 loss of the boxes
    giou_weight: Weight = 2.0  # of the GIoU loss of the boxes

    def scaled(self, factor: float, box_factor: float = 1.0) -> "LossWeights":
        """All three times `factor`; those of L1 and GIoU also times `box_factor`."""
        return LossWeights(
            self.class_weight * factor,
            self.l1_weight * factor * box_factor,
            self.giou_weight * factor * box_factor,
        )

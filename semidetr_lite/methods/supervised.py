"""Supervised training: labelled images only.

The teacher is kept too, so that it is measured like that of the semi-supervised methods and can
start them.
"""

import torch

from semidetr_lite.contracts import Batch
from semidetr_lite.detectors.pyramid import TorchvisionDetector
from semidetr_lite.detectors.transformer import stack_layers
from semidetr_lite.device import copy_to_host
from semidetr_lite.losses import (
    TargetSet,
    add_prefix,
    denoising_losses,
    detection_losses,
    token_losses,
)
from semidetr_lite.matching import layer_costs, match_layers
from semidetr_lite.methods.mean_teacher import RNG_LABELLED, TeacherStudent


class Supervised(TeacherStudent):
    """Supervised training with one-to-one matching and denoising.

    Faster R-CNN and FCOS keep their own losses, which `loss_weights` do not change. For the
    arguments see TeacherStudent.
    """

    def forward(
        self, batch: Batch, step: int, prepared: TargetSet | None = None
    ) -> dict[str, torch.Tensor]:
        """The weighted losses of a batch with "labelled"; see TeacherStudent.forward."""
        images, truths = batch["labelled"]
        if isinstance(self.student, TorchvisionDetector):
            seed = self.step_seed(step, RNG_LABELLED)
            return add_prefix("labelled", self.student.losses(images, truths, seed))
        labelled = prepared or self.make_labelled_sets([batch])[0]
        denoising = self.make_denoising_queries([labelled], [truths], step)
        outputs = self.student(images, [queries.group for queries in denoising])
        layers = stack_layers(outputs)
        (costs,) = copy_to_host(layer_costs(layers, labelled.targets))
        assignment = match_layers(
            layers, labelled.targets, "one_to_one", costs=costs, valid=labelled.valid
        )
        losses = detection_losses(layers, [labelled], [assignment], "one_to_one")
        losses |= token_losses(outputs, [labelled])
        return losses | denoising_losses(outputs["groups"], denoising, [labelled])

    def prepare(self, micro_batches: list[Batch], step: int) -> list[TargetSet | None]:
        """Count the boxes of the whole step; Faster R-CNN and FCOS divide by their own numbers."""
        if isinstance(self.student, TorchvisionDetector):
            return [None] * len(micro_batches)
        return [*self.make_labelled_sets(micro_batches)]

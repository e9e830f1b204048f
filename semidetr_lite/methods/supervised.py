"""Supervised training: labelled images only.

Its average is kept too, so that it is measured like the semi-supervised methods and can start them.
"""

import torch

from semidetr_lite.detectors.pyramid import Pyramid
from semidetr_lite.losses import detection_loss, layer_costs, stack_layers
from semidetr_lite.matching import pad_targets
from semidetr_lite.methods.mean_teacher import LABELLED, Averaged, named, one_transfer


class Supervised(Averaged):
    """One-to-one matching and denoising; Faster R-CNN's and FCOS's own losses, without `weights`. See Averaged."""

    def forward(self, batch: dict, step: int) -> dict[str, torch.Tensor]:
        """A batch with "labelled" -> weighted losses."""
        images, truths = batch["labelled"]
        if isinstance(self.student, Pyramid):
            return named("labelled", self.student.losses(images, truths, self.draw(step, LABELLED)))
        targets = pad_targets(truths, next(self.parameters()).device)
        memory = self.student.encode(images)
        outputs = self.student.decode(memory)
        layers = stack_layers(outputs)
        costs, valid = one_transfer(layer_costs(layers, targets), targets.valid)
        losses = named("labelled", detection_loss(layers, targets, "one_to_one", costs, valid, weights=self.weights))
        noise = self.denoise(memory, outputs, targets, self.weights, step, LABELLED)
        return losses | named("labelled denoising", noise)

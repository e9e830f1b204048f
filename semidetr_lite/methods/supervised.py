"""Supervised training: labelled images only.

Its average is kept too, so that it is measured like the semi-supervised methods and can start them.
"""

import torch

from semidetr_lite.detectors.pyramid import Pyramid
from semidetr_lite.losses import count_boxes, detection_loss, layer_costs, stack_layers
from semidetr_lite.matching import pad_targets
from semidetr_lite.methods.mean_teacher import LABELLED, Averaged, filled_up, named, one_transfer


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
        count = batch.get("counts") or count_boxes([valid], layers.logits.shape[2])
        targets, weights = filled_up(targets, count.most), self.weights
        found = detection_loss(layers, targets, "one_to_one", costs, valid, weights=weights, count=count)
        losses = named("labelled", found)
        noise = self.denoise(memory, outputs, targets, weights, step, LABELLED, truths, count)
        return losses | named("labelled denoising", noise)

    def look_ahead(self, parts: list[dict], step: int) -> list[dict]:
        """See Averaged."""
        if isinstance(self.student, Pyramid):
            return parts
        valid = [pad_targets(part["labelled"][1]).valid.numpy() for part in parts]
        return [{**part, "counts": count_boxes(valid, self.student.num_queries)} for part in parts]

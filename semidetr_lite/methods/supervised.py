"""Supervised training: labelled images only.

Its average is kept too, so that it is measured like the semi-supervised methods and can start them.
"""

import torch

from semidetr_lite.detectors.pyramid import Pyramid
from semidetr_lite.losses import count_boxes, layer_costs, stack_layers
from semidetr_lite.matching import pad_targets
from semidetr_lite.methods.mean_teacher import LABELLED, Averaged, filled_up, named, one_transfer


class Supervised(Averaged):
    """One-to-one matching and denoising; Faster R-CNN's and FCOS's own losses, without `weights`. See Averaged."""

    def forward(self, batch: dict, step: int) -> dict[str, torch.Tensor]:
        """A batch with "labelled" -> weighted losses."""
        images, truths = batch["labelled"]
        if isinstance(self.student, Pyramid):
            return named("labelled", self.student.losses(images, truths, self.draw(step, LABELLED)))
        batch = self.counted(batch, step)
        targets = filled_up(pad_targets(truths, next(self.parameters()).device), batch["counts"]["labelled"].most)
        asked = self.questions({"labelled": targets}, batch, step)
        outputs = self.student(images, [questions.group for questions in asked.values()])
        layers = stack_layers(outputs)
        costs, valid = one_transfer(layer_costs(layers, targets), targets.valid)
        boxes, decided = {"labelled": targets}, {"labelled": (valid, costs)}
        return self.compare(batch, (outputs, layers), boxes, decided, "one_to_one", asked)

    def look_ahead(self, parts: list[dict], step: int) -> list[dict]:
        """See Averaged."""
        if isinstance(self.student, Pyramid):
            return parts
        valid = [pad_targets(part["labelled"][1]).valid.numpy() for part in parts]
        counts = {"labelled": count_boxes(valid, self.student.num_queries)}
        return [{"labelled": part["labelled"], "counts": counts} for part in parts]

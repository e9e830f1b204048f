"""Supervised training: labelled images only.

Its average is kept too, so that it is measured like the semi-supervised methods and can start them.
"""

import torch

from semidetr_lite.methods.mean_teacher import Averaged, labelled_losses


class Supervised(Averaged):
    """One-to-one matching and denoising on labelled images; see Averaged for the arguments."""

    def forward(self, batch: dict, step: int) -> dict[str, torch.Tensor]:
        """A batch with "labelled" -> weighted losses."""
        images, truths = batch["labelled"]
        return labelled_losses(self, images, truths, step)

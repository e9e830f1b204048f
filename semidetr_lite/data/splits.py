"""Which images are labelled, which are not, and what the method is measured on.

A split is drawn from (percent, fold) alone, so that two processes, two machines and two methods train on the same
images.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import ConcatDataset

from semidetr_lite.errors import UserError


class Dataset(Protocol):
    """Images and targets by index, with the sizes known before an image is decoded."""

    sizes: list[tuple[int, int]]  # (H, W) of every image

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]: ...


@dataclass(frozen=True)
class Splits:
    """What a run sees: `labelled` and `unlabelled` to train on, `tune` to choose on, `test` to report on."""

    labelled: Dataset
    unlabelled: Dataset
    tune: Dataset
    test: Dataset
    categories: list[dict]  # [{"id", "name"}], in the order of the labels 0..C-1
    flip: bool  # whether a mirrored image is still a valid one (not for digits)


SEED = 2023  # of every draw of labelled images


def labelled_indices(count: int, percent: float, fold: int) -> list[int]:
    """The sorted indices of the labelled images.

    `percent` % of `count`, at least one, a different draw for each fold (1, 2, ...).
    """
    if not 0 < percent <= 100:
        raise UserError(f"percent must be over 0 and at most 100, got {percent:g}")
    chosen = max(1, round(count * percent / 100))
    order = np.random.default_rng([fold, SEED]).permutation(count)
    return sorted(int(index) for index in order[:chosen])


class Subset:
    """Some images of a dataset, labelled as they are."""

    def __init__(self, dataset: Dataset, indices: list[int]):
        self.dataset, self.indices = dataset, list(indices)
        self.sizes = [dataset.sizes[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        return self.dataset[self.indices[index]]


class Unlabelled(Subset):
    """Some images of a dataset with their labels taken away.

    What is true moves under "truth", to be measured, never trained on.
    """

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        image, target = super().__getitem__(index)
        hidden = {"size": target["size"], "image_id": target["image_id"]}
        return image, {**hidden, "truth": target} if "boxes" in target else hidden


class Joined(ConcatDataset):
    """Several datasets, one after the other."""

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        return [size for dataset in self.datasets for size in dataset.sizes]

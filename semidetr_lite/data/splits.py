"""Which images are labelled, which are unlabelled, and which are evaluated on.

A split is drawn from (percent, fold) alone, so that two processes, two machines and two methods
train on the same images.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from semidetr_lite.contracts import Target, View
from semidetr_lite.errors import UserError


class Dataset(Protocol):
    """Images and targets by index, with the image sizes known before an image is decoded."""

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of every image."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> View: ...


@dataclass(frozen=True)
class Splits:
    """The data of a run: two training sets, a set for choices and a set for the final figures."""

    labelled: Dataset  # to train on, with boxes and labels
    unlabelled: Dataset  # to train on, without
    tune: Dataset  # choices are made on it
    test: Dataset  # only reported
    categories: list[dict]  # [{"id", "name"}], in the order of the labels 0..C-1
    flip: bool  # whether a mirrored image is still a valid one (not for digits)


SEED = 2023  # of every draw of labelled images


def labelled_indices(count: int, percent: float, fold: int) -> list[int]:
    """The sorted indices of the labelled images among `count` images.

    `percent` % of them, at least one, another draw for each fold (1, 2, ...). Raises UserError for
    a percentage that is not over 0 and at most 100.
    """
    if not 0 < percent <= 100:
        raise UserError(f"percent must be over 0 and at most 100, got {percent:g}")
    labelled_count = max(1, round(count * percent / 100))
    order = np.random.default_rng([fold, SEED]).permutation(count)
    return sorted(int(index) for index in order[:labelled_count])


def stratified_indices(classes: list[set[int]], percent: float, fold: int) -> list[int]:
    """Sorted indices, as many as `labelled_indices` draws, with its fraction of every class.

    A class that is on n images should be on percent % of n labelled ones, at least on one. Images
    without any class count as one more class, without that minimum. From the rarest class to the
    most frequent, images that have it are taken until it has its number: in the fold's random
    order, but first those that put no other class over its own number. Equally rare classes come in
    a random order. The last places go to images in the fold's random order.

    Args:
        classes: the class ids of each image.
        percent, fold: as of `labelled_indices`.
    """
    count = len(labelled_indices(len(classes), percent, fold))
    rng = np.random.default_rng([fold, SEED])
    order = rng.permutation(len(classes)).tolist()
    strata: list[set] = [set(of_image) or {None} for of_image in classes]
    frequency = Counter(stratum for of_image in strata for stratum in of_image)
    goal = {
        stratum: max(stratum is not None, round(images * percent / 100))
        for stratum, images in frequency.items()
    }
    ties: dict[int | None, float] = dict(zip(sorted(set().union(*classes)), rng.random(len(goal))))

    def rarest_first(stratum: int | None) -> tuple:
        return (
            stratum is None,
            frequency[stratum],
            ties.get(stratum),
        )

    labelled: set[int] = set()
    reached: Counter = Counter()

    def overfills(index: int) -> bool:
        return any(reached[stratum] >= goal[stratum] for stratum in strata[index])

    for stratum in sorted(goal, key=rarest_first):
        candidates = [i for i in order if stratum in strata[i] and i not in labelled]
        for index in sorted(candidates, key=overfills):
            if reached[stratum] >= goal[stratum] or len(labelled) == count:
                break
            labelled.add(index)
            reached.update(strata[index])
    rest = [index for index in order if index not in labelled]
    return sorted([*labelled, *rest[: count - len(labelled)]])


class Subset:
    """Some images of a dataset, with their labels."""

    def __init__(self, dataset: Dataset, indices: list[int]):
        self.dataset = dataset
        self.indices = list(indices)
        self.sizes = [dataset.sizes[index] for index in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> View:
        return self.dataset[self.indices[index]]


class WithoutLabels(Subset):
    """Some images of a dataset without their labels.

    A target keeps "size" and "image_id". The true boxes and labels move under "truth": they are
    measured against, never trained on.
    """

    def __getitem__(self, index: int) -> View:
        image, target = super().__getitem__(index)
        unlabelled: Target = {"size": target["size"], "image_id": target["image_id"]}
        if "boxes" in target:
            unlabelled["truth"] = target
        return image, unlabelled


class NobodyLabelled(Subset):
    """Images of a labelled dataset that nobody labelled: no boxes, and no truth to measure with."""

    def __getitem__(self, index: int) -> View:
        image, target = super().__getitem__(index)
        return image, {"size": target["size"], "image_id": target["image_id"]}


class Concat:
    """Several datasets, one after the other."""

    def __init__(self, datasets: Sequence[Dataset]):
        self.datasets = list(datasets)

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(H, W) of every image."""
        return [size for dataset in self.datasets for size in dataset.sizes]

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def __getitem__(self, index: int) -> View:
        index = range(len(self))[index]  # -1 is the last one
        for dataset in self.datasets:
            if index < len(dataset):
                break
            index -= len(dataset)
        return dataset[index]


def sample_targets(dataset: Dataset, most: int) -> list[Target]:
    """The targets of at most so many images, evenly over the data set."""
    count = len(dataset)
    indices = np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()
    return [target_of(dataset, index) for index in indices]


def target_of(dataset: Dataset, index: int) -> Target:
    """The target of an image, without decoding it where the dataset can tell."""
    if isinstance(dataset, Subset):
        return target_of(dataset.dataset, dataset.indices[index])
    if hasattr(dataset, "target"):
        return dataset.target(index)
    return dataset[index][1]

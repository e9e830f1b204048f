"""Mean teacher for detection transformers.

An exponential moving average (EMA) of the student labels the images that nobody labelled.

    teacher(weak view) -> confident boxes -> mapped to the strong view -> targets of the student

This is the plain method of the comparison: one-to-one matching, no consistency, no mining
("DINO SSOD" in the paper's tables).

Differences from the released code: docs/paper_vs_code.md.

Shapes: B images, K pseudo-boxes per image, T targets, Q queries.
"""

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from semidetr_lite import distributed
from semidetr_lite.boxes import to_model
from semidetr_lite.contracts import Batch, Outputs, Target
from semidetr_lite.data.mixing import Sources, map_to_mixed_views, sources_of
from semidetr_lite.data.views import map_boxes
from semidetr_lite.detectors.detector import Detector, class_scores, postprocess
from semidetr_lite.detectors.transformer import Memory, stack_layers
from semidetr_lite.device import copy_to_host, to_device
from semidetr_lite.losses import (
    DenoisingQueries,
    LossWeights,
    TargetSet,
    denoising_losses,
    detection_losses,
    make_target_sets,
    token_losses,
)
from semidetr_lite.matching import PaddedTargets, layer_costs, match_layers, pad_targets
from semidetr_lite.methods.cost_mining import mining_candidates
from semidetr_lite.normalizer_settings import NormalizerSettings

RNG_LABELLED, RNG_UNLABELLED = range(2)  # separate streams of random numbers
RNG_STREAMS = {"labelled": RNG_LABELLED, "pseudo": RNG_UNLABELLED}  # by TargetSet.name


# ---- the teacher as an average -------------------------------------------------------------------


def ema_momentum(step: int, ceiling: float = 0.999) -> float:
    """The fraction of itself that the teacher keeps in the update before iteration `step`.

    Released code: mean_teacher.py:37-50.
    """
    return min(ceiling, 1 - 1 / (step + 1))


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum * teacher + (1 - momentum) * student, for parameters and buffers.

    Buffers that are not floats, such as counters, are copied.
    """
    teacher_tensors = (*teacher.parameters(), *teacher.buffers())
    student_tensors = (*student.parameters(), *student.buffers())
    pairs = list(zip(teacher_tensors, student_tensors, strict=True))
    averaged = [(old, new) for old, new in pairs if old.is_floating_point()]
    old_tensors, new_tensors = [old for old, _ in averaged], [new for _, new in averaged]
    torch._foreach_lerp_(old_tensors, new_tensors, 1 - momentum)
    for old, new in pairs:
        if not old.is_floating_point():
            old.copy_(new)


class TeacherStudent(nn.Module):
    """Base of all methods: a student, its EMA (the teacher), and what is measured of the teacher.

    Args:
        student: the detector that is trained.
        ema_decay: the highest momentum of the EMA; the teacher averages over about
            1 / (1 - ema_decay) steps.
        seed: of the random numbers of denoising and sampling.
        loss_weights: factors of the losses.
        normalizers: what the losses are divided by.
    """

    pseudo_boxes_per_class: torch.Tensor  # (C,) running mean per image
    score_threshold: float  # of the semi-supervised methods
    max_pseudo_boxes: int  # of the semi-supervised methods

    def __init__(
        self,
        student: Detector,
        ema_decay: float = 0.999,
        seed: int = 0,
        loss_weights: LossWeights = LossWeights(),
        normalizers: NormalizerSettings = NormalizerSettings(),
    ):
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False).eval()
        self.ema_decay, self.seed, self.loss_weights = ema_decay, seed, loss_weights
        self.normalizers = normalizers
        # of the last step, for the log; tensors are read where a line is written
        self.stats: dict[str, float | torch.Tensor] = {}
        uniform = torch.ones(student.num_classes) / student.num_classes
        self.register_buffer("pseudo_boxes_per_class", uniform)

    def train(self, mode: bool = True) -> "TeacherStudent":
        """Set the student's mode; the teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Batch, step: int, prepared: Any = None) -> dict[str, torch.Tensor]:
        """The weighted losses of a batch, or of one of the micro-batches of a step.

        Args:
            batch: see the contract of batches: "labelled", "weak" and "strong".
            step: number of the step in the whole training, burn-in included.
            prepared: what `prepare` returned for this micro-batch, where a step has several; None
                for a batch that is the whole step.
        """
        raise NotImplementedError

    def prepare(self, micro_batches: list[Batch], step: int) -> list[Any]:
        """What the losses of each micro-batch need to know of the whole step: here, nothing."""
        return [None] * len(micro_batches)

    def make_labelled_sets(self, micro_batches: list[Batch]) -> list[TargetSet]:
        """The labelled targets of each micro-batch, with the box counts of the whole step."""
        truths = [pad_targets(batch["labelled"][1]) for batch in micro_batches]
        return make_target_sets(
            "labelled",
            truths,
            valid_masks=[truth.valid.numpy() for truth in truths],
            first_images=[0] * len(micro_batches),
            student=self.student,
            loss_weights=self.loss_weights,
            settings=self.normalizers,
        )

    def after_step(self, step: int) -> None:
        """Move the teacher; call it after the optimizer's step number `step`."""
        ema_update(self.teacher, self.student, ema_momentum(step + 1, self.ema_decay))

    def update_pseudo_box_stats(
        self, labels: torch.Tensor, keep: torch.Tensor, num_images: int
    ) -> None:
        """Update the running mean, over about 50 steps, of the pseudo-boxes per class and image.

        Args:
            labels, keep: (...) classes of boxes, and whether each box counts.
            num_images: the images that they are from.
        """
        counts = torch.zeros_like(self.pseudo_boxes_per_class)
        counts.index_add_(0, labels.flatten(), keep.flatten().float())
        per_image = distributed.all_reduce_mean(counts / num_images)
        self.pseudo_boxes_per_class.lerp_(per_image, 0.02)

    def collapse_warning(self) -> str | None:
        """A sentence if the teacher has collapsed: hardly any pseudo-boxes, or all of one class."""
        counts = self.pseudo_boxes_per_class.tolist()
        if sum(counts) < 0.01:
            return (
                "no pseudo-boxes for long; lower the score threshold or start from a longer burn-in"
            )
        if len(counts) > 1 and max(counts) > 0.998 * sum(counts):
            number = counts.index(max(counts))
            return f"all pseudo-boxes are of one class (number {number}) for long"
        return None

    def image_generators(
        self, step: int, stream: int, targets: list[Target]
    ) -> list[np.random.Generator]:
        """A generator per image, which depends on (seed, step, position in the whole step) alone.

        targets: one target dict per image; "position" is its index where it is not given.
        """
        positions = [target.get("position", index) for index, target in enumerate(targets)]
        return [np.random.default_rng([self.seed, 7, stream, step, index]) for index in positions]

    def step_seed(self, step: int, stream: int) -> int:
        """A seed for the numbers that torch draws in a step."""
        return int(np.random.default_rng([self.seed, 8, stream, step]).integers(2**63))

    def make_denoising_queries(
        self, target_sets: list[TargetSet], views: list[list[Target]], step: int
    ) -> list[DenoisingQueries]:
        """Denoising queries of each kind of images that has a box, if the detector has denoising.

        Args:
            target_sets: the kinds of images with denoising.
            views: the target dicts of all images that the student sees: the labelled ones, then
                the strong views, if any.
            step: number of the step.
        """
        denoising: list[DenoisingQueries] = []
        num_images = sum(len(targets) for targets in views)
        if self.student.denoising is None:
            return denoising
        for target_set, targets in zip(target_sets, views, strict=False):
            normalizers = target_set.normalizers
            if normalizers.step.max_per_image == 0:
                continue
            stream = RNG_STREAMS[target_set.name]
            generators = self.image_generators(step, stream, targets)
            max_targets = [group.max_per_image for group in normalizers.groups]
            parts = [(rows, max_targets[number]) for number, rows in normalizers.rows.items()]
            made = self.student.denoising.of_parts(*target_set.targets, generators, parts)
            group, denoising_targets = made
            group = group.pad_to_batch(target_set.images, num_images)
            copies = [self.student.denoising.num_copies(most) for most in max_targets]
            queries = (target_set.name, group, target_set.targets, denoising_targets, copies)
            denoising.append(DenoisingQueries(*queries))
        return denoising


# ---- pseudo-boxes --------------------------------------------------------------------------------


class PseudoBoxes(NamedTuple):
    """The teacher's boxes on the weak views, at most K per image, best first."""

    boxes: torch.Tensor  # (B, K, 4) xyxy pixels of the weak view
    scores: torch.Tensor  # (B, K)
    labels: torch.Tensor  # (B, K)
    valid: torch.Tensor  # (B, K) bool, False in the padding
    pair_scores: torch.Tensor | None = None  # (B, Q * C) of all query-class pairs, if known

    def above(self, threshold: float) -> torch.Tensor:
        """The boxes whose score is at least the threshold: (B, K) bool."""
        return self.valid & (self.scores >= threshold)

    def to_strong_view(self, weak: list[Target], strong: list[Target]) -> PaddedTargets:
        """The boxes in model coordinates of the strong views; those out of view are not valid.

        weak, strong: a target dict per image, with "matrix" and "size".
        """
        device = self.boxes.device
        matrices = to_device(torch.stack(weak_to_strong(weak, strong)), device)
        sizes = to_device(image_sizes(strong), device)
        boxes, in_view = map_boxes(self.boxes, matrices, sizes)
        return PaddedTargets(to_model(boxes, sizes), self.labels, self.valid & in_view)

    def to_mixed_views(
        self, sources: Sources, weak: list[Target], strong: list[Target]
    ) -> PaddedTargets:
        """The same where strong views are mixed, for the S * K boxes `of_sources`."""
        sizes = to_device(image_sizes(strong), self.boxes.device)
        boxes = self.boxes.unflatten(1, (sources.rows.shape[1], -1))
        boxes, in_view = map_to_mixed_views(boxes, sources, weak)
        valid = self.valid & in_view.flatten(1)
        return PaddedTargets(to_model(boxes.flatten(1, 2), sizes), self.labels, valid)


def weak_to_strong(weak: list[Target], strong: list[Target]) -> list[torch.Tensor]:
    """The matrix (3, 3) of each image that takes pixels of its weak view to its strong view."""
    pairs = zip(weak, strong, strict=True)
    return [
        strong_view["matrix"] @ torch.linalg.inv(weak_view["matrix"])
        for weak_view, strong_view in pairs
    ]


def image_sizes(targets: list[Target]) -> torch.Tensor:
    """(B, 2) the (H, W) of each image."""
    return torch.tensor([target["size"] for target in targets])


def select_pseudo_boxes(
    outputs: Outputs, sizes: torch.Tensor, max_boxes: int, nms: float
) -> PseudoBoxes:
    """The best boxes of the teacher: scores of at least 0.01, after class-wise NMS.

    NMS runs in both stages (released code: dino_detr_ssod_head.py:1371-1395).

    Args:
        outputs: the teacher's.
        sizes: (B, 2) (H, W) of the weak views.
        max_boxes: K at most.
        nms: IoU above which the lower of two boxes of one class is dropped.
    """
    boxes, scores, labels, valid = postprocess(outputs, sizes, 3 * max_boxes, 0.01, nms)
    # valid ones to the front, still by score
    order = valid.long().sort(dim=1, descending=True, stable=True).indices[:, :max_boxes]
    return PseudoBoxes(
        boxes.gather(1, order[..., None].expand(-1, -1, 4)),
        scores.gather(1, order),
        labels.gather(1, order),
        valid.gather(1, order),
        class_scores(outputs).flatten(1).clamp(min=0),
    )


class PseudoLabels(NamedTuple):
    """What the teacher predicts on the weak views, and the same boxes in the strong views."""

    weak: PseudoBoxes
    weak_sizes: torch.Tensor  # (B, 2) (H, W) of the weak views, on the CPU
    strong: PaddedTargets
    confident: torch.Tensor  # (B, K) bool, in view and of at least the score threshold
    candidates: torch.Tensor  # (B, K) bool, in view and what Semi-DETR's mining chooses from
    teacher: tuple[Memory, Outputs] | None  # memory and outputs, where consistency needs them
    weak_rows: np.ndarray | None = None  # (B, K) the weak view of each box; None: its own image's


def of_sources(entry: torch.Tensor, sources: Sources) -> torch.Tensor:
    """What belongs to the K boxes of each weak view, side by side for each mixed strong view.

    entry: (B, K, ...) -> (B, S * K, ...).
    """
    return entry[to_device(torch.from_numpy(sources.rows), entry.device)].flatten(1, 2)


class Mining(NamedTuple):
    """What mining over a whole step decides for one of its micro-batches."""

    mined: np.ndarray  # (B, K) bool, the mined boxes
    compared: np.ndarray  # (B, K) bool, the boxes that become consistency queries
    threshold: float  # the matching cost up to which a box counts as reliable
    # rows of images, and what the sum over their consistency queries is divided by
    num_compared: list[tuple[slice, float]]
    targets: TargetSet  # the boxes that class and box losses are trained towards


class Prepared(NamedTuple):
    """What the losses of a micro-batch need to know before the student runs."""

    labelled: TargetSet
    pseudo: TargetSet  # the confident boxes
    pseudo_labels: PseudoLabels
    confident: np.ndarray  # `pseudo_labels.confident` on the CPU
    candidates: np.ndarray  # `pseudo_labels.candidates` on the CPU
    mining: Mining | None = None  # where the student has run ahead, see SemiDETR.run_ahead


# ---- the method ----------------------------------------------------------------------------------


class MeanTeacher(TeacherStudent):
    """Mean teacher: the confident boxes of the teacher are targets of the student.

    Args:
        student: the detector that is trained.
        score_threshold: pseudo-boxes of at least this score are confident.
        unlabelled_weight: factor of all losses on unlabelled images.
        unlabelled_box_weight: extra factor of their box losses, since the box of a right
            pseudo-label may be loose.
        max_pseudo_boxes: K, the teacher's boxes per image at most.
        nms: IoU of the NMS of pseudo-boxes.
        ema_decay, seed, loss_weights, normalizers: see TeacherStudent.
    """

    mining = "none"  # the rule of cost_mining.py, which only Semi-DETR has
    mining_top_k = 0
    candidate_scores = "boxes"

    def __init__(
        self,
        student: Detector,
        score_threshold: float = 0.4,
        unlabelled_weight: float = 4.0,
        unlabelled_box_weight: float = 1.0,
        max_pseudo_boxes: int = 100,
        nms: float = 0.6,
        ema_decay: float = 0.999,
        seed: int = 0,
        loss_weights: LossWeights = LossWeights(),
        normalizers: NormalizerSettings = NormalizerSettings(),
    ):
        super().__init__(student, ema_decay, seed, loss_weights, normalizers)
        self.score_threshold = score_threshold
        self.unlabelled_weight = unlabelled_weight
        self.max_pseudo_boxes = max_pseudo_boxes
        self.nms = nms
        self.pseudo_loss_weights = loss_weights.scaled(unlabelled_weight, unlabelled_box_weight)
        # objects per labelled image, a running mean over about 50 steps; nan before the first
        self.objects_per_image: torch.Tensor
        self.register_buffer("objects_per_image", torch.tensor(torch.nan))

    def forward(
        self, batch: Batch, step: int, prepared: Prepared | None = None
    ) -> dict[str, torch.Tensor]:
        """The weighted losses of a batch; see TeacherStudent.forward."""
        (images, truths), (strong_images, strong_views) = batch["labelled"], batch["strong"]

        # 1. Pseudo-labels: the teacher's boxes on the weak views, mapped to the strong views
        prepared = prepared or self.prepare([batch], step)[0]
        labelled, pseudo, confident = prepared.labelled, prepared.pseudo, prepared.confident
        self.stats = {"pseudo_per_image": float(confident.sum() / len(strong_images))}

        # 2. One student pass over labelled and strong images, with denoising queries of both
        target_sets = [labelled, pseudo]
        denoising = self.make_denoising_queries(target_sets, [truths, strong_views], step)
        groups = [queries.group for queries in denoising]
        outputs = self.student([*images, *strong_images], groups)
        layers = stack_layers(outputs)

        # 3. All matching costs to the CPU, in one copy
        costs = copy_to_host(
            layer_costs(layers.of_images(labelled.images), labelled.targets),
            layer_costs(layers.of_images(pseudo.images), pseudo.targets),
        )

        # 4. One-to-one matching; class, L1 and GIoU losses of both kinds of images
        assignments = [
            match_layers(
                layers.of_images(target_set.images),
                target_set.targets,
                "one_to_one",
                costs=its_costs,
                valid=target_set.valid,
            )
            for target_set, its_costs in zip(target_sets, costs, strict=True)
        ]
        losses = detection_losses(layers, target_sets, assignments, "one_to_one")
        losses |= token_losses(outputs, target_sets)
        return losses | denoising_losses(outputs["groups"], denoising, target_sets)

    def has_consistency(self, step: int) -> bool:
        """Whether a step has a consistency loss, which needs the teacher's memory and outputs."""
        return False

    def prepare(self, micro_batches: list[Batch], step: int) -> list[Prepared]:
        """Predict the pseudo-labels of all micro-batches, then count the boxes of the whole step.

        Args:
            micro_batches: of one step, each with "labelled", "weak" and "strong".
            step: number of the step.
        """
        keep_teacher = self.has_consistency(step)
        predicted = [self.predict_pseudo_labels(batch, keep_teacher) for batch in micro_batches]
        on_device = [mask for labels in predicted for mask in (labels.confident, labels.candidates)]
        *masks, objects_per_image = copy_to_host(*on_device, self.objects_per_image)
        confident, candidates = masks[::2], masks[1::2]
        labelled = self.make_labelled_sets(micro_batches)
        expected = self.update_objects_per_image(float(objects_per_image), labelled[0])
        pseudo = make_target_sets(
            "pseudo",
            [labels.strong._replace(valid=labels.confident) for labels in predicted],
            valid_masks=confident,
            first_images=[len(batch["labelled"][0]) for batch in micro_batches],
            student=self.student,
            loss_weights=self.pseudo_loss_weights,
            settings=self.normalizers,
            expected_per_image=expected,
        )
        entries = zip(labelled, pseudo, predicted, confident, candidates, strict=True)
        return [Prepared(*entry) for entry in entries]

    def update_objects_per_image(self, so_far: float, labelled: TargetSet) -> float:
        """Update the running mean of the objects per labelled image.

        Args:
            so_far: the mean on the CPU, nan before the first step.
            labelled: a labelled target set, which knows the numbers of the whole step.

        Returns:
            The objects that an unlabelled image is expected to have: the new mean, or 0 where
            the settings do not ask for it.
        """
        step = labelled.normalizers.step
        now = step.boxes / max(step.images, 1)
        mean = now if math.isnan(so_far) else so_far + 0.02 * (now - so_far)
        self.objects_per_image.fill_(mean)
        return mean if self.normalizers.pseudo_normalizer == "expected_objects" else 0.0

    @torch.no_grad()
    def predict_pseudo_labels(self, micro_batch: Batch, keep_teacher: bool) -> PseudoLabels:
        """The teacher's boxes on the weak views of a micro-batch, mapped to its strong views."""
        (images, weak_views), (_, strong_views) = micro_batch["weak"], micro_batch["strong"]
        memory = self.teacher.encode(images)
        outputs = self.teacher.decode(memory)
        sizes = image_sizes(weak_views)
        weak = select_pseudo_boxes(outputs, sizes, self.max_pseudo_boxes, self.nms)
        confident = weak.above(self.score_threshold)
        self.update_pseudo_box_stats(weak.labels, confident, len(images))
        candidates = self.mining_candidates(weak)
        sources, weak_rows = sources_of(strong_views), None
        if sources is None:
            strong = weak.to_strong_view(weak_views, strong_views)
        else:
            weak_rows = sources.rows.repeat(weak.boxes.shape[1], axis=1)
            weak = PseudoBoxes(*(of_sources(entry, sources) for entry in weak[:4]))
            confident, candidates = (of_sources(one, sources) for one in (confident, candidates))
            strong = weak.to_mixed_views(sources, weak_views, strong_views)
        return PseudoLabels(
            weak,
            sizes,
            strong,
            confident=confident & strong.valid,
            candidates=candidates & strong.valid,
            teacher=(memory, outputs) if keep_teacher else None,
            weak_rows=weak_rows,
        )

    def mining_candidates(self, pseudo: PseudoBoxes) -> torch.Tensor:
        """The boxes that Semi-DETR's mining chooses from: (B, K) bool."""
        pair_scores = pseudo.pair_scores if self.candidate_scores == "pairs" else None
        return mining_candidates(
            pseudo.scores, pseudo.valid, self.mining, self.mining_top_k, pair_scores
        )

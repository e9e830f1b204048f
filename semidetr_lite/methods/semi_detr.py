"""Semi-DETR (Zhang et al., CVPR 2023), in three parts on top of a mean teacher.

Stage-wise hybrid matching, cross-view query consistency and cost-based pseudo-label mining.

One step, in the paper's words:

    the teacher predicts pseudo-boxes on the weak views                              (section 3.1)
    the student, on labelled images and strong views, is matched one-to-many before step
        `one_to_many_steps`, one-to-one from then on                            (SHM, section 3.2)
    a mixture over matching costs mines more reliable pseudo-boxes              (CPM, section 3.4)
    confident and mined boxes are queries of both decoders, which should agree  (CQC, section 3.3)

The targets of class and box losses are the confident boxes alone, those of at least the score
threshold; mined boxes feed the consistency only. What the paper's ablation changes is an argument:
`consistency_boxes`, `mining`, `mined_targets`, `one_to_many_steps`. Backbone and encoder run once
per image and network. The matching queries never see the extra queries: those of denoising are
decoded beside them; those of consistency, which depend on the matching, afterwards against what
was kept.

Consistency is trained in stage one only, as in the released code (dino_detr_ssod.py:469), unless
`consistency_in_both_stages`. Differences from paper and released code: docs/paper_vs_code.md.
"""

import numpy as np
import torch

from semidetr_lite import distributed
from semidetr_lite.contracts import Batch
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.transformer import Layers, stack_layers
from semidetr_lite.device import copy_to_host, to_device
from semidetr_lite.errors import UserError
from semidetr_lite.losses import (
    LossWeights,
    TargetSet,
    denoising_losses,
    detection_losses,
    make_target_sets,
    token_losses,
)
from semidetr_lite.matching import layer_costs, match_layers, matched_costs
from semidetr_lite.methods.cost_mining import CANDIDATE_SCORES, MINING, mine, push_costs
from semidetr_lite.methods.mean_teacher import MeanTeacher, Mining, Prepared
from semidetr_lite.methods.query_consistency import (
    PROJECTOR_NORMS,
    DecodedView,
    Projector,
    consistency_and_cosines,
)
from semidetr_lite.methods.step_norm import forget_step, update_running_statistics
from semidetr_lite.normalizer_settings import NormalizerSettings
from semidetr_lite.normalizers import sum_per_group

CONSISTENCY_BOXES = ("both", "confident", "mined", "none")


class SemiDETR(MeanTeacher):
    """Semi-DETR: a mean teacher with hybrid matching, query consistency and cost-based mining.

    Args:
        student: a detector that takes boxes as queries.
        one_to_many_steps: the step at which stage two begins.
        candidates: queries that a target takes at most in stage one.
        consistency_weight: of the consistency loss, before `unlabelled_weight`.
        consistency_in_both_stages: whether consistency is trained in both stages (paper) or in
            stage one alone (released code).
        consistency_boxes: which boxes become consistency queries: "confident", "mined", "both", or
            "none", which leaves stage-wise matching alone.
        mining: the rule, see cost_mining.py: "gmm" (the paper's), "mean_std", "top_k" or "none".
        mining_top_k: boxes per image that the rule "top_k" mines.
        mined_targets: whether mined boxes are targets of the class and box losses too.
        cost_queue_size: past matching costs that join the mixture.
        candidate_scores: mining chooses from boxes that reach mean plus standard deviation of the
            scores of the image's "boxes" (released code) or of all its query-class "pairs".
        projector_norm: of the network that makes the content of consistency queries, "batch" (as
            released) or "group"; see query_consistency.py.
        nms: IoU of the NMS of pseudo-boxes, and of detections in stage one.
        score_threshold, unlabelled_weight, unlabelled_box_weight, max_pseudo_boxes: see
            MeanTeacher.
        ema_decay, seed, loss_weights, normalizers: see TeacherStudent.

    Raises UserError for a detector that takes no boxes as queries, and for an unknown value of
    `consistency_boxes`, `mining`, `candidate_scores` or `projector_norm`.
    """

    cost_queue: torch.Tensor  # (cost_queue_size,) past matching costs, nan where there is none yet

    def __init__(
        self,
        student: Detector,
        one_to_many_steps: int,
        candidates: int = 13,
        consistency_weight: float = 10.0,
        consistency_in_both_stages: bool = False,
        consistency_boxes: str = "both",
        mining: str = "gmm",
        mining_top_k: int = 9,
        mined_targets: bool = False,
        cost_queue_size: int = 500,
        score_threshold: float = 0.4,
        unlabelled_weight: float = 4.0,
        unlabelled_box_weight: float = 1.0,
        max_pseudo_boxes: int = 100,
        nms: float = 0.6,
        ema_decay: float = 0.999,
        seed: int = 0,
        loss_weights: LossWeights = LossWeights(),
        normalizers: NormalizerSettings = NormalizerSettings(),
        candidate_scores: str = "boxes",
        projector_norm: str = "group",
    ):
        if not student.takes_groups:
            name = type(student).__name__
            raise UserError(
                f"semi-detr needs boxes as queries, which {name} in this form does not take: "
                "choose dino, or deformable-detr with two_stage=True"
            )
        _check_choice("consistency_boxes", consistency_boxes, CONSISTENCY_BOXES)
        _check_choice("mining", mining, MINING)
        _check_choice("candidate_scores", candidate_scores, CANDIDATE_SCORES)
        _check_choice("projector_norm", projector_norm, PROJECTOR_NORMS)
        super().__init__(
            student,
            score_threshold,
            unlabelled_weight,
            unlabelled_box_weight,
            max_pseudo_boxes,
            nms,
            ema_decay,
            seed,
            loss_weights,
            normalizers,
        )
        self.one_to_many_steps = one_to_many_steps
        self.candidates = candidates
        self.consistency_weight = consistency_weight
        self.consistency_in_both_stages = consistency_in_both_stages
        self.consistency_boxes = consistency_boxes
        self.mining, self.mining_top_k, self.mined_targets = mining, mining_top_k, mined_targets
        self.candidate_scores = candidate_scores
        self.projector = Projector(student.dim, hidden=4 * student.dim, norm=projector_norm)
        self.register_buffer("cost_queue", torch.full((cost_queue_size,), torch.nan))

    def stage(self, step: int) -> str:
        """The matching of a step: "one_to_many" or "one_to_one"."""
        return "one_to_many" if step < self.one_to_many_steps else "one_to_one"

    def has_consistency(self, step: int) -> bool:
        """Whether a step has a consistency loss."""
        in_this_stage = self.stage(step) == "one_to_many" or self.consistency_in_both_stages
        return self.consistency_boxes != "none" and in_this_stage

    def after_step(self, step: int) -> None:
        """Move the teacher, and note whether detections of these weights need NMS.

        All processes call it after the optimizer's step, and the projector's running statistics
        move.
        """
        super().after_step(step)
        update_running_statistics(self.projector.modules())
        nms = self.nms if self.stage(step) == "one_to_many" else None
        self.student.nms = self.teacher.nms = nms

    def forward(
        self, batch: Batch, step: int, prepared: Prepared | None = None
    ) -> dict[str, torch.Tensor]:
        """The weighted losses of a batch; see TeacherStudent.forward."""
        stage = self.stage(step)
        (images, truths), (strong_images, strong_views) = batch["labelled"], batch["strong"]

        # 1. Pseudo-labels: the teacher's boxes on the weak views, mapped to the strong views (3.1)
        prepared = prepared or self.prepare([batch], step)[0]
        labelled, pseudo, labels, confident, _, mining = prepared

        # 2. One student pass over labelled and strong images; denoising beside the matching queries
        denoised = [labelled, pseudo] if stage == "one_to_one" else [labelled]
        denoising = self.make_denoising_queries(denoised, [truths, strong_views], step)
        memory = self.student.encode([*images, *strong_images])
        outputs = self.student.decode(memory, [queries.group for queries in denoising])
        layers = stack_layers(outputs)

        # 3. All matching costs to the CPU, in one copy
        costs = self.copy_costs(layers, prepared, stage)

        # 4. CPM: mine the pseudo-boxes that match the student's predictions at low cost (3.4)
        if mining is None:  # no other micro-batch takes part
            (mining,) = self.mine_step([costs["mining"]], [prepared], costs["past"])
        self.stats = {
            "pseudo_per_image": float(confident.sum() / len(confident)),
            "mined_per_image": float((mining.mined & ~confident).sum() / len(confident)),
            "cost_threshold": mining.threshold,
        }

        # 5. SHM: match as the stage says; class, L1 and GIoU losses of both kinds of images (3.2)
        target_sets = [labelled, mining.targets]
        assignments = [
            match_layers(
                layers.of_images(target_set.images),
                target_set.targets,
                stage,
                self.candidates,
                costs.get(target_set.name),
                target_set.valid,
            )
            for target_set in target_sets
        ]
        losses = detection_losses(layers, target_sets, assignments, stage)
        losses |= token_losses(outputs, target_sets)  # none but of Deformable DETR
        losses |= denoising_losses(outputs["groups"], denoising, denoised)

        # 6. CQC: both decoders should describe the confident and the mined boxes alike (3.3)
        if labels.teacher is not None:
            student = DecodedView(self.student, memory, outputs).of_images(pseudo.images)
            teacher = DecodedView(self.teacher, *labels.teacher)
            loss, cosines = consistency_and_cosines(
                self.projector, student, teacher, labels, mining.compared, mining.num_compared
            )
            losses["consistency"] = self.unlabelled_weight * self.consistency_weight * loss
            self.stats |= cosines._asdict()
        return losses

    def copy_costs(self, layers: Layers, prepared: Prepared, stage: str) -> dict[str, np.ndarray]:
        """The matching costs that a step decides by, on the CPU, in one copy.

        Args:
            layers: of all images that the student sees.
            prepared: the targets.
            stage: the matching of the step.

        Returns:
            "mining" (B, Q, K) of the last layer and "past", the queue, unless the mining is done
            already; and of one-to-one matching "labelled" and "pseudo" (L, B, Q, T).
        """
        labelled, pseudo, labels = prepared[:3]
        strong_layers = layers.of_images(pseudo.images)
        costs = {}
        targets = labels.strong if self.mined_targets else pseudo.targets
        if prepared.mining is None:
            costs["mining"] = layer_costs(strong_layers.last_of_decoder(), labels.strong)[0]
            costs["past"] = self.cost_queue
        else:
            targets = prepared.mining.targets.targets
        if stage == "one_to_one":
            costs["labelled"] = layer_costs(layers.of_images(labelled.images), labelled.targets)
            costs["pseudo"] = layer_costs(strong_layers, targets)
        return dict(zip(costs, copy_to_host(*costs.values()), strict=True)) if costs else {}

    def prepare(self, micro_batches: list[Batch], step: int) -> list[Prepared]:
        """See MeanTeacher.prepare; the teacher's memory is kept where a step has consistency.

        Of several micro-batches, the student runs ahead where the losses of one depend on what is
        matched or mined in the others.
        """
        forget_step(self.projector.modules())
        prepared = super().prepare(micro_batches, step)
        one_to_many = self.stage(step) == "one_to_many"
        depends = one_to_many or self.has_consistency(step) or self.mined_targets
        if len(micro_batches) > 1 and depends:
            prepared = self.run_ahead(micro_batches, prepared, one_to_many)
        return prepared

    @torch.no_grad()
    def run_ahead(
        self, micro_batches: list[Batch], prepared: list[Prepared], one_to_many: bool
    ) -> list[Prepared]:
        """Run the student on all micro-batches without gradient, to mine and match.

        So mining sees the costs of the whole step, and one-to-many matching is divided by the soft
        targets of the whole step, as if it were one batch. The price is a forward pass.

        Args:
            micro_batches: of one step.
            prepared: what the teacher said about each.
            one_to_many: whether this is the matching of the step.
        """
        layers = [
            stack_layers(self.student([*batch["labelled"][0], *batch["strong"][0]]))
            for batch in micro_batches
        ]
        strong_layers = [
            own.of_images(known.pseudo.images) for own, known in zip(layers, prepared, strict=True)
        ]
        on_device = [
            layer_costs(own.last_of_decoder(), known.pseudo_labels.strong)[0]
            for own, known in zip(strong_layers, prepared, strict=True)
        ]
        *last_costs, past_costs = copy_to_host(*on_device, self.cost_queue)
        mining = self.mine_step(last_costs, prepared, past_costs)
        if one_to_many:
            labelled = self.with_soft_targets(layers, [known.labelled for known in prepared])
            targets = self.with_soft_targets(layers, [one.targets for one in mining])
            prepared = [
                known._replace(labelled=target_set)
                for known, target_set in zip(prepared, labelled, strict=True)
            ]
            mining = [
                one._replace(targets=target_set)
                for one, target_set in zip(mining, targets, strict=True)
            ]
        return [known._replace(mining=one) for known, one in zip(prepared, mining, strict=True)]

    def with_soft_targets(
        self, layers: list[Layers], target_sets: list[TargetSet]
    ) -> list[TargetSet]:
        """Target sets of all micro-batches with the sums of their soft targets over the step."""
        rule = ("one_to_many", self.candidates)
        sums = []
        for own, target_set in zip(layers, target_sets, strict=True):
            matched = match_layers(own.of_images(target_set.images), target_set.targets, *rule)
            sums.append(matched.quality.float().sum((-2, -1)))  # (L,)
        total = torch.stack(sums).sum(0)
        total = distributed.all_reduce_mean(total) * distributed.world_size()
        return [
            target_set._replace(normalizers=target_set.normalizers._replace(soft_targets=total))
            for target_set in target_sets
        ]

    def mine_step(
        self, last_costs: list[np.ndarray], prepared: list[Prepared], past_costs: np.ndarray
    ) -> list[Mining]:
        """Mine the boxes of all micro-batches, and say what becomes of them; queue the costs.

        Args:
            last_costs: (B, Q, K) of each micro-batch, of the student's last layer.
            prepared: what the teacher said about each.
            past_costs: the queue, on the CPU.
        """
        matched = [
            matched_costs(costs, known.confident | known.candidates)
            for costs, known in zip(last_costs, prepared, strict=True)
        ]
        of_step, threshold, new_costs = mine(
            pad_and_concatenate(matched, np.nan),
            pad_and_concatenate([known.candidates for known in prepared], False),
            past_costs,
            self.mining,
        )
        self.cost_queue = push_costs(self.cost_queue, new_costs)
        edges = np.cumsum([len(known.confident) for known in prepared])[:-1]
        mined = [
            mask[:, : known.confident.shape[1]]
            for mask, known in zip(np.split(of_step, edges), prepared, strict=True)
        ]
        compared = [
            self.boxes_to_compare(known.confident, mask)
            for known, mask in zip(prepared, mined, strict=True)
        ]
        normalizers = [known.pseudo.normalizers for known in prepared]
        totals = sum_per_group(normalizers, [mask.sum(1) for mask in compared])
        targets = [known.pseudo for known in prepared]
        if self.mined_targets:
            targets = self.with_mined(prepared, mined)
        parts = zip(mined, compared, normalizers, targets, strict=True)
        return [
            Mining(own, mask, threshold, by.divide(totals), target_set)
            for own, mask, by, target_set in parts
        ]

    def boxes_to_compare(self, confident: np.ndarray, mined: np.ndarray) -> np.ndarray:
        """Which boxes become consistency queries, from two masks (B, K) bool: a mask."""
        masks = {"both": confident | mined, "confident": confident, "mined": mined}
        return masks.get(self.consistency_boxes, np.zeros_like(mined))

    def with_mined(self, prepared: list[Prepared], mined: list[np.ndarray]) -> list[TargetSet]:
        """The confident and the mined boxes (B, K) as targets, of all micro-batches."""
        masks = [known.confident | own for known, own in zip(prepared, mined, strict=True)]
        targets = []
        for known, mask in zip(prepared, masks, strict=True):
            boxes = known.pseudo_labels.strong
            valid = to_device(torch.from_numpy(mask), boxes.boxes.device)
            targets.append(boxes._replace(valid=valid))
        first = prepared[0].pseudo
        return make_target_sets(
            first.name,
            targets,
            valid_masks=masks,
            first_images=[known.pseudo.images.start for known in prepared],
            student=self.student,
            loss_weights=first.loss_weights,
            settings=self.normalizers,
            expected_per_image=first.normalizers.expected_per_image,
        )


def pad_and_concatenate(masks: list[np.ndarray], fill: float) -> np.ndarray:
    """Arrays (B, K) of micro-batches as one; where K differs, the missing columns are `fill`."""
    most = max(mask.shape[1] for mask in masks)
    padding = [((0, 0), (0, most - mask.shape[1])) for mask in masks]
    pairs = zip(masks, padding, strict=True)
    return np.concatenate([np.pad(mask, pad, constant_values=fill) for mask, pad in pairs])


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises UserError for a value that is not known."""
    if value not in known:
        raise UserError(f"no {name} called {value!r}: choose from {', '.join(known)}")

"""Semi-DETR (Zhang et al., CVPR 2023): stage-wise hybrid matching, cross-view query consistency and
cost-based pseudo-label mining.

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

Difference from the paper: consistency in stage one only (as in the released code,
dino_detr_ssod.py:469), unless `consistency_in_both_stages`.
Differences from the released code: boxes that leave the strong view are dropped; a queue of past
costs joins the mixture; and a confident box is not dropped where its score is below the mean plus
one standard deviation of its image's scores (with few boxes in an image that bar is high).
"""

import numpy as np
import torch

from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.transformer import stack_layers
from semidetr_lite.device import copy_to_host, to_device
from semidetr_lite.errors import UserError
from semidetr_lite.losses import (
    LossWeights,
    TargetSet,
    denoising_losses,
    detection_losses,
    make_target_sets,
)
from semidetr_lite.matching import layer_costs, match_layers, matched_costs
from semidetr_lite.methods.cost_mining import CANDIDATE_SCORES, MINING, mine, push_costs
from semidetr_lite.methods.mean_teacher import MeanTeacher, Prepared
from semidetr_lite.methods.query_consistency import (
    PROJECTOR_NORMS,
    DecodedView,
    Projector,
    consistency_and_cosines,
)
from semidetr_lite.methods.step_norm import forget_step, update_running_statistics

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
        ema_decay, seed, loss_weights: see TeacherStudent.

    Raises UserError for a detector that takes no boxes as queries, and for an unknown value of
    `consistency_boxes`, `mining`, `candidate_scores` or `projector_norm`.
    """

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
        self, batch: dict, step: int, prepared: Prepared | None = None
    ) -> dict[str, torch.Tensor]:
        """The weighted losses of a batch; see TeacherStudent.forward."""
        stage = self.stage(step)
        (images, truths), (strong_images, strong_views) = batch["labelled"], batch["strong"]

        # 1. Pseudo-labels: the teacher's boxes on the weak views, mapped to the strong views (3.1)
        prepared = prepared or self.prepare([batch], step)[0]
        labelled, pseudo, labels, confident, candidates = prepared

        # 2. One student pass over labelled and strong images; denoising beside the matching queries
        denoised = [labelled, pseudo] if stage == "one_to_one" else [labelled]
        denoising = self.make_denoising_queries(denoised, [truths, strong_views], step)
        memory = self.student.encode([*images, *strong_images])
        outputs = self.student.decode(memory, [queries.group for queries in denoising])
        layers = stack_layers(outputs)
        labelled_layers = layers.of_images(labelled.images)
        strong_layers = layers.of_images(pseudo.images)

        # 3. All matching costs to the CPU, in one copy
        if self.mined_targets:
            pseudo = pseudo._replace(targets=labels.strong)
        costs = [layer_costs(strong_layers.last_of_decoder(), labels.strong)[0], self.cost_queue]
        if stage == "one_to_one":
            costs.append(layer_costs(labelled_layers, labelled.targets))
            costs.append(layer_costs(strong_layers, pseudo.targets))
        last_costs, past_costs, *costs = copy_to_host(*costs)

        # 4. CPM: mine the pseudo-boxes that match the student's predictions at low cost (3.4)
        matched = matched_costs(last_costs, confident | candidates)
        mined, threshold, new_costs = mine(matched, candidates, past_costs, self.mining)
        self.cost_queue = push_costs(self.cost_queue, new_costs)
        self.stats = {
            "pseudo_per_image": float(confident.sum() / len(confident)),
            "mined_per_image": float((mined & ~confident).sum() / len(confident)),
            "cost_threshold": threshold,
        }
        if self.mined_targets:
            pseudo = self.with_mined(pseudo, confident | mined)

        # 5. SHM: match as the stage says; class, L1 and GIoU losses of both kinds of images (3.2)
        labelled_costs, pseudo_costs = costs or (None, None)
        rule = (stage, self.candidates)
        assignments = [
            match_layers(labelled_layers, labelled.targets, *rule, labelled_costs, labelled.valid),
            match_layers(strong_layers, pseudo.targets, *rule, pseudo_costs, pseudo.valid),
        ]
        losses = detection_losses(layers, [labelled, pseudo], assignments, stage)
        losses |= denoising_losses(outputs["groups"], denoising, [labelled, pseudo])

        # 6. CQC: both decoders should describe the confident and the mined boxes alike (3.3)
        if labels.teacher is not None:
            student = DecodedView(self.student, memory, outputs).of_images(pseudo.images)
            teacher = DecodedView(self.teacher, *labels.teacher)
            masks = {"both": confident | mined, "confident": confident, "mined": mined}
            mask = masks[self.consistency_boxes]
            loss, cosines = consistency_and_cosines(self.projector, student, teacher, labels, mask)
            losses["consistency"] = self.unlabelled_weight * self.consistency_weight * loss
            self.stats |= cosines._asdict()
        return losses

    def prepare(self, micro_batches: list[dict], step: int) -> list[Prepared]:
        """See MeanTeacher.prepare; the teacher's memory is kept where a step has consistency."""
        forget_step(self.projector.modules())
        return super().prepare(micro_batches, step, keep_teacher=self.has_consistency(step))

    def with_mined(self, pseudo: TargetSet, mask: np.ndarray) -> TargetSet:
        """The pseudo-boxes of a mask (B, K) bool as targets, counted within this micro-batch."""
        device = pseudo.targets.boxes.device
        targets = pseudo.targets._replace(valid=to_device(torch.from_numpy(mask), device))
        return make_target_sets(
            pseudo.name,
            [targets],
            valid_masks=[mask],
            first_images=[pseudo.images.start],
            student=self.student,
            loss_weights=pseudo.loss_weights,
        )[0]


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raises UserError for a value that is not known."""
    if value not in known:
        raise UserError(f"no {name} called {value!r}: choose from {', '.join(known)}")

"""Semi-DETR (Zhang et al., CVPR 2023): stage-wise matching, query consistency, cost-based pseudo-label mining.

One step, in the paper's words:

    teacher(weak view) gives pseudo-boxes                                                            (section 3.1)
    student(labelled and strong views) is matched one-to-many up to step `one_to_many_steps`,
        one-to-one after it                                                                     (SHM, section 3.2)
    pseudo-boxes the student finds cheap are mined by a mixture over matching costs             (CPM, section 3.4)
    confident and mined boxes ask both decoders the same question; the answers should agree     (CQC, section 3.3)

Targets of the class and box losses are the boxes over the score cut alone; mined ones feed the consistency only. What
the paper's ablation changes is an argument: `consistency_boxes`, `mining`, `mined_targets`, `one_to_many_steps`. The
backbone and encoder run once per image and network. Matching queries never see the extra queries: those of denoising
are decoded beside them, those of consistency, which are chosen by the matching, afterwards against what was kept.

Difference from the paper: consistency in stage one only (as in the released code, dino_detr_ssod.py:469), unless
`consistency_throughout` asks for both.
Differences from the released code: boxes that leave the strong view are dropped; a memory of past costs joins the
mixture; and a box over the score cut is not dropped for lying under the mean plus one deviation of its image's
scores (with few boxes in an image that bar is high).
"""

import numpy as np
import torch

from semidetr_lite import distributed
from semidetr_lite.boxes import to_model
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.transformer import QueryGroup, output_rows
from semidetr_lite.device import to_device
from semidetr_lite.errors import UserError
from semidetr_lite.losses import Layers, count_boxes, layer_costs, stack_layers
from semidetr_lite.matching import PaddedTargets, batched_cost, pad_targets
from semidetr_lite.methods.cost_mining import matched_costs, reliable_threshold, remember
from semidetr_lite.methods.mean_teacher import (
    Look,
    MeanTeacher,
    PseudoBoxes,
    filled_up,
    one_transfer,
    places_of,
    pseudo_boxes,
    target_sizes,
)
from semidetr_lite.methods.query_consistency import Projector, consistency_loss

CONSISTENCY_BOXES = ("both", "confident", "mined", "none")
MINING = ("mixture", "deviation", "top", "none")


class SemiDETR(MeanTeacher):
    """The method.

    Args:
        student: a detector that takes boxes as queries; any other one is a UserError.
        one_to_many_steps: the step at which stage two begins.
        candidates: queries a target takes in stage one.
        consistency_weight: of the consistency loss, before `unlabelled_weight`.
        consistency_throughout: whether it is asked for in both stages (paper) or in stage one alone (released code).
        consistency_boxes: it is asked for those over the score cut ("confident"), the "mined" ones, "both", or "none",
            which leaves stage-wise matching alone.
        mining: which boxes are mined: those the "mixture" over matching costs finds reliable (the paper's), all above
            mean and "deviation" of their image's scores, the `mined_top` best of each image ("top"), or "none".
        mined_targets: whether mined boxes are targets of the class and box losses too.
        cost_memory: past matching costs that join the mixture.
        shared: see MeanTeacher and Averaged; `nms` is that of detections in stage one too.
    """

    def __init__(
        self,
        student: Detector,
        one_to_many_steps: int,
        candidates: int = 13,
        consistency_weight: float = 10.0,
        consistency_throughout: bool = False,
        consistency_boxes: str = "both",
        mining: str = "mixture",
        mined_top: int = 9,
        mined_targets: bool = False,
        cost_memory: int = 500,
        **shared,
    ):
        if not student.takes_groups:
            unable = f"semi-detr asks with boxes as queries, which {type(student).__name__} in this form cannot"
            raise UserError(f"{unable}: choose dino, or deformable-detr with two_stage=True")
        chosen = {"consistency_boxes": (consistency_boxes, CONSISTENCY_BOXES), "mining": (mining, MINING)}
        for name, (value, known) in chosen.items():
            if value not in known:
                raise UserError(f"no {name} called {value!r}: choose from {', '.join(known)}")
        super().__init__(student, **shared)
        self.one_to_many_steps, self.candidates = one_to_many_steps, candidates
        self.consistency_weight = consistency_weight
        self.consistency_throughout, self.consistency_boxes = consistency_throughout, consistency_boxes
        self.mining, self.mined_top, self.mined_targets = mining, mined_top, mined_targets
        self.projector = Projector(student.dim, hidden=4 * student.dim)
        self.register_buffer("past_costs", torch.full((cost_memory,), torch.nan))

    def stage(self, step: int) -> str:
        """The matching of a step: "one_to_many" or "one_to_one"."""
        return "one_to_many" if step < self.one_to_many_steps else "one_to_one"

    def after_step(self, step: int) -> None:
        """Move the teacher, and note whether detections of these weights need suppression."""
        super().after_step(step)
        self.student.nms = self.teacher.nms = self.nms if self.stage(step) == "one_to_many" else None

    def forward(self, batch: dict, step: int) -> dict[str, torch.Tensor]:
        """A batch with "labelled", "weak" and "strong" -> weighted losses."""
        batch, stage = self.counted(batch, step), self.stage(step)
        (images, truths), (_, weak), (strong_images, _) = (batch[name] for name in ("labelled", "weak", "strong"))
        pseudo, carried, minable, teacher = batch["look"]
        self.count_pseudo(pseudo.labels, pseudo.over(self.score_cut), len(weak))
        boxes = {"labelled": pad_targets(truths, carried.boxes.device), "pseudo": self.confident(batch["look"])}
        boxes = {name: filled_up(targets, batch["counts"][name].most) for name, targets in boxes.items()}
        asked = self.questions(boxes if stage == "one_to_one" else {"labelled": boxes["labelled"]}, batch, step)

        memory = self.student.encode([*images, *strong_images])
        outputs = self.student.decode(memory, [questions.group for questions in asked.values()])
        layers = stack_layers(outputs)
        labelled, unlabelled = places_of(batch).values()
        boxes |= {"pseudo": carried} if self.mined_targets else {}
        seen = (pseudo.scores, minable)
        found = self.decide(layers.rows(labelled), layers.rows(unlabelled), boxes, carried, seen, stage)
        if self.mined_targets:  # only now can they be counted, as those of a part
            counted = {"pseudo": count_boxes([found["pseudo"][0]], self.student.num_queries)}
            batch = {**batch, "counts": batch["counts"] | counted}
        losses = self.compare(batch, (outputs, layers), boxes, found, stage, asked)
        if teacher:
            student = (memory.rows(unlabelled), output_rows(outputs, unlabelled))
            loss = self.consistency(student, teacher, pseudo, carried, weak, found["asked"])
            losses["consistency"] = self.unlabelled_weight * self.consistency_weight * loss
        return losses

    def look(self, batch: dict, step: int) -> Look:
        """The teacher's boxes that are confident or may be mined; the teacher where consistency is asked for."""
        (images, weak), (_, strong) = batch["weak"], batch["strong"]
        with torch.no_grad():
            memory = self.teacher.encode(images)
            outputs = self.teacher.decode(memory)
            pseudo = pseudo_boxes(outputs, target_sizes(weak), self.most, self.nms)
        minable = self.minable(pseudo)
        pseudo = pseudo._replace(valid=pseudo.over(self.score_cut) | minable)
        asks = self.consistency_boxes != "none" and (self.stage(step) == "one_to_many" or self.consistency_throughout)
        return Look(pseudo, pseudo.carried(weak, strong), minable, (memory, outputs) if asks else None)

    def minable(self, pseudo: PseudoBoxes) -> torch.Tensor:
        """(B, K) bool: the boxes, best first in each image, that mining chooses from."""
        if self.mining == "top":
            return pseudo.valid & (torch.arange(pseudo.valid.shape[1], device=pseudo.valid.device) < self.mined_top)
        return super().minable(pseudo) if self.mining == "none" else above_mean_and_deviation(pseudo)

    def decide(
        self, labelled: Layers, unlabelled: Layers, boxes: dict, carried: PaddedTargets, seen, stage: str
    ) -> dict:
        """Everything that is decided on the host, after one transfer; `seen` are scores and `minable` of `carried`.

        Which boxes (B, T) bool are targets, and the costs of one-to-one matching: "labelled", "pseudo"; and which
        pseudo-boxes the consistency is "asked" for.
        """
        last = -2 if unlabelled.encoder else -1  # the decoder's last layer
        answers = unlabelled.logits[last].detach(), unlabelled.boxes[last].detach()
        prices = batched_cost(*answers, carried.boxes, carried.labels)
        sides = zip((labelled, unlabelled), boxes.values(), strict=True)
        further = [layer_costs(layers, targets) for layers, targets in sides] if stage == "one_to_one" else []
        wanted = (prices, *seen, carried.valid, boxes["labelled"].valid, self.past_costs, *further)
        prices, scores, minable, valid, truth_valid, past, *costs = one_transfer(*wanted)
        matched = matched_costs(prices, valid)
        everywhere = np.concatenate(distributed.gather(matched.ravel()))
        threshold = reliable_threshold(np.concatenate([past, everywhere]))
        self.past_costs = remember(self.past_costs, everywhere)
        confident = valid & (scores >= self.score_cut)
        mined = valid & self.mined(matched, threshold, minable)
        self.stats = {
            "pseudo_per_image": float(confident.sum() / len(valid)),
            "mined_per_image": float((mined & ~confident).sum() / len(valid)),  # confident ones are counted above
            "cost_threshold": threshold,
        }
        of_labelled, of_pseudo = costs or [None, None]
        taught = (confident | mined if self.mined_targets else confident)[:, : boxes["pseudo"].valid.shape[1]]
        return {
            "labelled": (truth_valid, of_labelled),
            "pseudo": (taught, of_pseudo),
            "asked": {"both": confident | mined, "mined": mined}.get(self.consistency_boxes, confident),
        }

    def mined(self, matched: np.ndarray, threshold: float, minable: np.ndarray) -> np.ndarray:
        """(B, K) bool: the boxes that cost at most the threshold (nan: unmatched), or without a mixture the minable."""
        return np.isfinite(matched) & (matched <= threshold) if self.mining == "mixture" else minable

    def consistency(self, student, teacher, pseudo: PseudoBoxes, carried: PaddedTargets, weak, asked) -> torch.Tensor:
        """The consistency loss over the boxes `asked` (B, K) bool, on the host; of both networks (Memory, outputs)."""
        count = max(sum(distributed.gather(int(asked.sum()))), 1) / distributed.world()
        if not asked.any():  # every process has a gradient
            return sum(parameter.sum() * 0.0 for parameter in self.projector.parameters())
        device = carried.boxes.device
        rows, columns = np.nonzero(asked)
        places = np.concatenate([np.arange(count) for count in asked.sum(1)])
        rows, columns, places = to_device(torch.from_numpy(np.stack([rows, columns, places])), device)
        sizes = target_sizes(weak)
        height, width = sizes.amax(0).tolist()
        features, sizes = teacher[0].features, to_device(sizes, device)
        strides = [(height / level.shape[-2], width / level.shape[-1]) for level in features]
        contents = self.projector(features, strides, rows, pseudo.boxes[rows, columns])
        shape = (len(asked), int(asked.sum(1).max()))
        valid = torch.zeros(shape, dtype=torch.bool, device=device)
        valid[rows, places] = True
        content = contents.new_zeros(*shape, contents.shape[1]).index_put((rows, places), contents)

        def group(boxes):
            filled = boxes.new_full((*shape, 4), 0.5).index_put((rows, places), boxes[rows, columns])
            return QueryGroup(content, filled, 1, valid)

        ours = self.student.decode_groups(*student, [group(carried.boxes)])[0]
        with torch.no_grad():
            theirs = self.teacher.decode_groups(*teacher, [group(to_model(pseudo.boxes, sizes))])[0]
        embeddings = ([layer["queries"] for layer in (*outputs["aux_outputs"], outputs)] for outputs in (ours, theirs))
        return consistency_loss(*embeddings, valid, count)


def above_mean_and_deviation(pseudo: PseudoBoxes) -> torch.Tensor:
    """(B, K) bool: scores of at least their image's mean plus one deviation (released: dino_detr_ssod.py:918-939)."""
    count = pseudo.valid.sum(1, keepdim=True)
    scores = torch.where(pseudo.valid, pseudo.scores, 0.0)
    mean = scores.sum(1, keepdim=True) / count.clamp(min=1)
    squares = torch.where(pseudo.valid, scores - mean, 0.0).square().sum(1, keepdim=True)
    spread = (squares / (count - 1).clamp(min=1)).sqrt()
    return pseudo.valid & (pseudo.scores >= mean + spread) & (count > 1)  # one score has no deviation

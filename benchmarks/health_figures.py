"""Health of the pieces of Semi-DETR in some runs: the cosines of CQC, and what CPM finds.

    python benchmarks/health_figures.py RUN... --out notebooks/recorded/health.json

One entry per run: how it was made, its log, and how alike student and teacher describe objects of
the tune split. A run may have been stopped before its end. No figure is of the test split.
"""

import argparse
import json
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from semidetr_lite import load_detector
from semidetr_lite.data.views import strong_view, weak_view
from semidetr_lite.files import read_jsonl, write_atomic
from semidetr_lite.matching import one_to_one
from semidetr_lite.training.checkpoint import read_config
from semidetr_lite.training.presets import load_splits
from semidetr_lite.training.settings import read_settings

SETTINGS = {
    "semi_detr": (
        "candidate_scores", "projector_norm", "projector_lr_factor", "consistency_weight",
        "consistency_boxes", "mining", "one_to_many_share",
    ),
    "views": ("mixing", "mixing_share"),
}  # fmt: skip
LOGGED = (
    "pseudo_per_image", "mined_per_image", "same_cosine", "different_cosine", "content_cosine"
)  # fmt: skip
MEASURED = (
    "AP_student", "AP_teacher", "pseudo_precision", "pseudo_recall", "mined_boxes",
    "mined_precision", "mined_recall", "mined_precision_any_class", "mined_recall_any_class",
)  # fmt: skip


def object_cosines(run: Path, images: int = 60) -> dict[str, float]:
    """Cosines of last embeddings, student in the strong against teacher in the weak view.

    "same" is of the queries that match the same object in both, "different" of two objects of a
    scene; of the first `images` scenes of the tune split.
    """
    config = read_settings(read_config(run), run / "config.json")
    student, teacher = (load_detector(run, weights) for weights in ("student", "teacher"))
    scenes, same, different = load_splits(config).tune, [], []
    for index in range(images):
        image, target = scenes[index]
        # the label says which object it is, also where a view has dropped some
        numbered = {**target, "labels": torch.arange(len(target["labels"]))}
        embeddings = []
        for number, (detector, view) in enumerate(((teacher, weak_view), (student, strong_view))):
            rng = np.random.default_rng([0, index, number])
            seen, found = view(image, numbered, rng, config.views)
            objects = found["labels"]
            found = {**found, "labels": target["labels"][objects]}
            with torch.no_grad():
                outputs = detector([seen])
            match = one_to_one(outputs["pred_logits"][0], outputs["pred_boxes"][0], found)
            rows = F.normalize(outputs["queries"][0][match.queries], dim=-1)
            embeddings.append(dict(zip(objects[match.targets].tolist(), rows, strict=True)))
        for ours, one in embeddings[0].items():
            for theirs, other in embeddings[1].items():
                (same if ours == theirs else different).append(float(one @ other))
    return {
        "same": round(statistics.mean(same), 4),
        "different": round(statistics.mean(different), 4),
        "objects": len(same),
    }


def figures_of(line: dict, keys: tuple[str, ...]) -> dict[str, float]:
    """Some keys of a log line; one that it does not have is left out."""
    return {key: round(line[key], 4) for key in keys if line.get(key) is not None}


def health(run: Path) -> dict:
    """The entry of a run."""
    config, log = read_config(run), read_jsonl(run / "log.jsonl")
    measured = [line for line in log if "AP_teacher" in line]
    return {
        "run": run.name,
        "settings": {key: config[group][key] for group, keys in SETTINGS.items() for key in keys},
        **{key: config[key] for key in ("method", "percent", "fold", "seed", "steps")},
        **{key: config[key] for key in ("command", "commit", "machine")},
        "seconds": log[-1]["seconds"],
        "logged": [{"step": line["step"], **figures_of(line, LOGGED)} for line in log],
        "measured": [{"step": line["step"], **figures_of(line, MEASURED)} for line in measured],
        "matching_queries": object_cosines(run),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = [health(run) for run in options.runs]
    write_atomic(options.out, json.dumps(lines, indent=1) + "\n")
    for line in lines:
        print(line["run"], line["logged"][-1], line["measured"][-1:], line["matching_queries"])


if __name__ == "__main__":
    main()

"""Weights that others published, under our names.

    facebookresearch/detr · fundamentalvision/Deformable-DETR (plain, box refinement, two-stage) ·
    IDEA-Research/DINO (4 and 5 scales) · JCZ404/Semi-DETR (whole, or its supervised detector) ·
    Hugging Face's DETR and Deformable DETR, as saved by versions 4 and 5

Each family is a table "their name -> our name", in which `#` stands for a number and `*` for the rest. Two things are
more than a name: Hugging Face keeps the three projections of an attention apart (`@q`, `@k`, `@v`: rows of one matrix
here), and Deformable DETR keeps position and content of its queries in one matrix (`a|b`: its left and right half).
Published heads that are shared by all layers appear under many names; any of them will do.
"""

import argparse
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from semidetr_lite.detectors.deformable_detr import DeformableDETR
from semidetr_lite.detectors.detector import Detector
from semidetr_lite.detectors.detr import DETR
from semidetr_lite.detectors.dino import DINO
from semidetr_lite.errors import UserError

# The 80 ids that COCO uses of 1..90; published detectors have a row for each of 0..90, ours for 80 classes have these.
COCO_IDS = [
    *range(1, 12),
    *range(13, 26),
    27,
    28,
    *range(31, 45),
    *range(46, 66),
    67,
    70,
    *range(72, 83),
    *range(84, 91),
]
CLASS_ROWS = ("class_head", "proposal_class", "denoising.labels")  # our entries with a row for each class


class Family(NamedTuple):
    """A kind of published file."""

    title: str
    detector: type[Detector]
    form: dict  # arguments of the detector that the file asks for
    marker: str  # a name that tells the file from the others
    table: dict[str, str]
    settings: dict = {}  # attributes of the detector


class Report(NamedTuple):
    """What became of every entry of a file."""

    title: str
    mapped: dict[str, str]  # their name -> our name
    ignored: list[str]  # counters, the other network of Semi-DETR, its projector
    unmapped: list[str]  # names that no table knows


# ---- tables
# ----------------------------------------------------------------------------------------------------------------

RESNET = {
    "conv1.*": "backbone.stem.0.*",
    "bn1.*": "backbone.stem.1.*",
    **{f"layer{stage + 1}.*": f"backbone.layers.{stage}.*" for stage in range(4)},
}
HF_RESNET = {  # transformers' own ResNet (revision "no_timm")
    "embedder.embedder.convolution.*": "backbone.stem.0.*",
    "embedder.embedder.normalization.*": "backbone.stem.1.*",
    "encoder.stages.#.layers.#.shortcut.convolution.*": "backbone.layers.#.#.downsample.0.*",
    "encoder.stages.#.layers.#.shortcut.normalization.*": "backbone.layers.#.#.downsample.1.*",
    **{
        f"encoder.stages.#.layers.#.layer.{place}.{theirs}.*": f"backbone.layers.#.#.{ours}{place + 1}.*"
        for place in range(3)
        for theirs, ours in (("convolution", "conv"), ("normalization", "bn"))
    },
}
SAMPLING = {
    "sampling_offsets": "offsets",
    "attention_weights": "weights",
    "value_proj": "value",
    "output_proj": "output",
}


def prefixed(table: dict[str, str], theirs: str = "", ours: str = "") -> dict[str, str]:
    """The table with both sides below a name."""
    return {theirs + left: ours + right for left, right in table.items()}


def mlp(theirs: str, ours: str) -> dict[str, str]:
    """Layers 0, 1, 2 of a published MLP are entries 0, 2, 4 of our Sequential."""
    return {f"{theirs}.layers.{layer}.*": f"{ours}.{2 * layer}.*" for layer in range(3)}


def sampling(theirs: str, ours: str) -> dict[str, str]:
    """A deformable attention."""
    return {f"{theirs}.{left}.*": f"{ours}.{right}.*" for left, right in SAMPLING.items()}


def attention(theirs: str, ours: str) -> dict[str, str]:
    """A plain attention, its three projections in one matrix or apart."""
    apart = {f"{theirs}.{part}_proj.*": f"{ours}.in_proj_*@{part}" for part in "qkv"}
    names = {
        "in_proj_weight": "in_proj_weight",
        "in_proj_bias": "in_proj_bias",
        "out_proj.*": "out_proj.*",
        "o_proj.*": "out_proj.*",
    }
    return apart | {f"{theirs}.{left}": f"{ours}.{right}" for left, right in names.items()}


def feed_forward(theirs: str, ours: str, norm: str) -> dict[str, str]:
    """The two linear layers by their three published names, and the LayerNorm after them."""
    names = {f"{form}{n}": f"linear{n}" for form in ("linear", "fc", "mlp.fc") for n in (1, 2)}
    return {f"{theirs}.{left}.*": f"{ours}.feed_forward.{right}.*" for left, right in (names | {norm: "norm"}).items()}


def layers(encoder_norms, decoder_norms, encoder_attention, cross: str, theirs: str) -> dict[str, str]:
    """Encoder and decoder layers. Norms are named for (attention, feed-forward) and (self, cross, feed-forward)."""
    encoder, decoder = f"{theirs}encoder.layers.#", f"{theirs}decoder.layers.#"
    table = encoder_attention(f"{encoder}.self_attn")
    table |= feed_forward(encoder, "encoder.#", encoder_norms[1])
    norm = "encoder.#.norm.*" if encoder_attention is sampled_encoder else "encoder.#.self_attention.norm.*"
    table[f"{encoder}.{encoder_norms[0]}.*"] = norm
    table |= attention(f"{decoder}.self_attn", "decoder.#.self_attention.attention")
    table |= (sampling if encoder_attention is sampled_encoder else attention)(
        f"{decoder}.{cross}", "decoder.#.attention"
    )
    table |= feed_forward(decoder, "decoder.#", decoder_norms[2])
    table[f"{decoder}.{decoder_norms[0]}.*"] = "decoder.#.self_attention.norm.*"
    table[f"{decoder}.{decoder_norms[1]}.*"] = "decoder.#.norm.*"
    return table


def sampled_encoder(theirs: str) -> dict[str, str]:
    return sampling(theirs, "encoder.#.attention")


def plain_encoder(theirs: str) -> dict[str, str]:
    return attention(theirs, "encoder.#.self_attention.attention")


HF_ENCODER = ("self_attn_layer_norm", "final_layer_norm")
HF_DECODER = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
DEFORMABLE_LAYERS = layers(
    ("norm1", "norm2"), ("norm2", "norm1", "norm3"), sampled_encoder, "cross_attn", "transformer."
)
HF_DEFORMABLE_LAYERS = layers(HF_ENCODER, HF_DECODER, sampled_encoder, "encoder_attn", "model.")
HF_BACKBONE = {
    **prefixed(RESNET, "model.backbone.conv_encoder.model."),
    **prefixed(HF_RESNET, "model.backbone.conv_encoder.model."),
    **prefixed(RESNET, "model.backbone.model."),
    **prefixed(HF_RESNET, "model.backbone.model."),
}
PYRAMID = {"level_embed": "level_embedding", "enc_output.*": "proposal.0.*", "enc_output_norm.*": "proposal.1.*"}

DETR_TABLE = {
    **prefixed(RESNET, "backbone.0.body."),
    **layers(("norm1", "norm2"), ("norm1", "norm2", "norm3"), plain_encoder, "multihead_attn", "transformer."),
    "transformer.decoder.norm.*": "decoder_norm.*",
    "input_proj.*": "projections.0.0.*",
    "query_embed.weight": "positions.weight",
    "class_embed.*": "class_head.*",
    **mlp("bbox_embed", "box_head"),
}
HF_DETR_TABLE = {
    **HF_BACKBONE,
    **layers(HF_ENCODER, HF_DECODER, plain_encoder, "encoder_attn", "model."),
    "model.decoder.layernorm.*": "decoder_norm.*",
    "model.input_projection.*": "projections.0.0.*",
    "model.query_position_embeddings.weight": "positions.weight",
    "class_labels_classifier.*": "class_head.*",
    **mlp("bbox_predictor", "box_head"),
}
DINO_TABLE = {
    **prefixed(RESNET, "backbone.0.body."),
    **DEFORMABLE_LAYERS,
    **prefixed(PYRAMID, "transformer."),
    "transformer.decoder.norm.*": "decoder_norm.*",
    "transformer.tgt_embed.weight": "content.weight",
    **mlp("transformer.decoder.ref_point_head", "query_positions"),
    "transformer.enc_out_class_embed.*": "proposal_class.*",
    **mlp("transformer.enc_out_bbox_embed", "proposal_box"),
    "input_proj.*": "projections.*",
    "label_enc.weight": "denoising.labels.weight",
    "class_embed.#.*": "class_head.*",
    "transformer.decoder.class_embed.#.*": "class_head.*",
    **{
        f"{where}bbox_embed.#.layers.{n}.*": f"box_head.{2 * n}.*"
        for where in ("", "transformer.decoder.")
        for n in range(3)
    },
}
SEMI_DETR_TABLE = {
    **prefixed(RESNET, "backbone."),
    **prefixed({left: right for left, right in DINO_TABLE.items() if not left.startswith("backbone")}, "bbox_head."),
    **{f"bbox_head.fc_reg.#.layers.{n}.*": f"box_head.{2 * n}.*" for n in range(3)},
    "bbox_head.fc_cls.#.*": "class_head.*",
    "bbox_head.fc_enc_cls.*": "proposal_class.*",
    **mlp("bbox_head.fc_enc_reg", "proposal_box"),
}


def deformable_table(form: str, layer_count: int = 6) -> dict[str, str]:
    """Deformable DETR, official and Hugging Face names at once; form: "plain", "refine" or "two-stage"."""
    table = {
        **prefixed(RESNET, "backbone.0.body."),
        **HF_BACKBONE,
        **DEFORMABLE_LAYERS,
        **HF_DEFORMABLE_LAYERS,
        "input_proj.*": "projections.*",
        "model.input_proj.*": "projections.*",
        "query_embed.weight": "positions.weight|content.weight",
        "model.query_position_embeddings.weight": "positions.weight|content.weight",
    }
    further = {
        "reference_points.*": "reference_points.*",
        "pos_trans.*": "box_code.0.*",
        "pos_trans_norm.*": "box_code.1.*",
    }
    for where in ("transformer.", "model."):
        table |= prefixed(PYRAMID | further, where)
    for where in ("", "transformer.decoder.", "model.decoder."):
        if form == "two-stage":  # the head behind the last layer's is the encoder's
            table |= {f"{where}class_embed.{layer_count}.*": "proposal_class.*"}
            table |= mlp(f"{where}bbox_embed.{layer_count}", "proposal_box")
        number = "0" if form == "plain" else "#"
        table |= {f"{where}class_embed.#.*": f"class_heads.{number}.*"}
        table |= {f"{where}bbox_embed.#.layers.{n}.*": f"box_heads.{number}.{2 * n}.*" for n in range(3)}
    return table


def families(layer_count: int) -> list[Family]:
    """Every kind of file, those first whose markers others have too."""
    refine, both = {"with_box_refine": True}, {"with_box_refine": True, "two_stage": True}
    found = [
        Family("Semi-DETR (JCZ404)", DINO, {}, "bbox_head.fc_cls.0.weight", SEMI_DETR_TABLE, {"eps": 1e-5}),
        Family("DINO (IDEA-Research)", DINO, {}, "label_enc.weight", DINO_TABLE, {"eps": 1e-3}),
        Family("DETR (Hugging Face)", DETR, {}, "class_labels_classifier.weight", HF_DETR_TABLE),
        Family("DETR (facebookresearch)", DETR, {}, "class_embed.weight", DETR_TABLE),
    ]
    for who, where in (("fundamentalvision", "transformer."), ("Hugging Face", "model.")):
        for form, title, arguments, marker in (
            ("two-stage", ", two-stage", both, "pos_trans.weight"),
            ("refine", " with box refinement", refine, "decoder.bbox_embed.0.layers.0.weight"),
            ("plain", "", {}, "reference_points.weight"),
        ):
            table = deformable_table(form, layer_count)
            found.append(Family(f"Deformable DETR{title} ({who})", DeformableDETR, arguments, where + marker, table))
    return found


# ---- loading
# ----------------------------------------------------------------------------------------------------------------


def load_public_weights(detector: Detector, path, part: str = "teacher") -> Report:
    """Fill a detector with published weights, in place.

    Args:
        detector: DETR, DeformableDETR or DINO of the file's size. Built for 80 classes it takes COCO's 80 rows of a
            file with 91; with softmax scores the file's unused classes are then left out of the sum.
        path: a .pth, .bin or .safetensors file.
        part: of a whole Semi-DETR file, "teacher" (what its authors evaluate) or "student".

    Raises:
        UserError: no such file, none of the known kinds, or one of another detector, form or size. The detector is
            then as it was.
    """
    tensors, ignored = _open(Path(path), part)
    family = recognise(tensors, path)
    own = detector.state_dict()
    wrong = type(detector) is not family.detector or any(
        getattr(detector, name, False) != family.form.get(name, False) for name in ("with_box_refine", "two_stage")
    )
    if wrong:
        raise UserError(f"{path}: weights of {family.title}; build {_call(family)} for them")
    mapped, unmapped, values = _translate(tensors, family.table)
    ignored += [key for key in unmapped if key.endswith("num_batches_tracked")]
    unmapped = [key for key in unmapped if not key.endswith("num_batches_tracked")]
    _repeat_tied_heads(values, own)
    for key in values.keys() & own.keys():
        values[key] = _class_rows(key, values[key], own[key])
    missing = [key for key in own if key not in values]
    different = [key for key in own if key in values and values[key].shape != own[key].shape]
    if missing or different or values.keys() - own.keys():
        key = (missing + different + sorted(values.keys() - own.keys()))[0]
        ours, theirs = (tuple(entry[key].shape) if key in entry else "nothing" for entry in (own, values))
        raise UserError(
            f"{path}: weights of {family.title}, but of another size than this detector: {key} is {theirs} there and "
            f"{ours} here; `semidetr doctor --weights` shows the file's sizes"
        )
    detector.load_state_dict(values)
    for name, value in family.settings.items():
        setattr(detector, name, value)
    return Report(family.title, mapped, ignored, unmapped)


def recognise(tensors: dict, path) -> Family:
    """The kind of a file by its names."""
    numbers = [int(found[1]) for key in tensors if (found := re.search(r"decoder\.layers\.(\d+)\.", key))]
    for family in families(max(numbers, default=-1) + 1):
        if family.marker in tensors:
            return family
    raise UserError(
        f"{path}: none of the published detectors this reads (DETR, Deformable DETR, DINO, Semi-DETR; their authors' "
        f"files or Hugging Face's); its first entry is {next(iter(tensors), 'none')!r}"
    )


def describe(path, part: str = "teacher") -> list[str]:
    """Lines about a published file: what it is, its sizes, and the detector to build for it."""
    tensors, _ = _open(Path(path), part)
    family = recognise(tensors, path)
    _, unmapped, values = _translate(tensors, family.table)
    return [
        f"{path}: {family.title}, {len(tensors)} entries, {len(unmapped)} without a place here",
        f"build: {_call(family, sizes(values, family))}",
        "then:  load_public_weights(detector, path)",
    ]


def sizes(values: dict, family: Family) -> dict:
    """Arguments of the detector, read off the shapes; heads (8) and points (4) cannot be."""
    count = {
        side: len({key.split(".")[1] for key in values if key.startswith(f"{side}.")})
        for side in ("encoder", "decoder")
    }
    head = "class_head.weight" if "class_head.weight" in values else "class_heads.0.weight"
    blocks = len({key.split(".")[3] for key in values if key.startswith("backbone.layers.2.")})
    found = {"num_classes": values[head].shape[0] - (family.detector is DETR)}
    learned = values.get("content.weight", values.get("positions.weight"))
    found |= {"num_queries": len(learned)} if learned is not None else {}
    found |= {"levels": len(values["level_embedding"])} if "level_embedding" in values else {}
    found |= {"hidden": values["encoder.0.feed_forward.linear1.weight"].shape[0], "dim": values[head].shape[1]}
    found |= {"encoder_layers": count["encoder"], "decoder_layers": count["decoder"]}
    return found | {
        "backbone": {6: "resnet50", 23: "resnet101"}.get(blocks, f"a ResNet with {blocks} blocks in layer 3")
    }


def _call(family: Family, arguments: dict | None = None) -> str:
    given = ", ".join(f"{name}={value!r}" for name, value in ((arguments or {}) | family.form).items())
    return f"{family.detector.__name__}({given})" if given else family.detector.__name__


def _open(path: Path, part: str) -> tuple[dict, list[str]]:
    """The tensors of a file under their names, outer wrappings taken off, and the names left out."""
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # options of a training, in some files
                content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of weights") from None
    except (pickle.UnpicklingError, EOFError):
        raise UserError(
            f"{path}: cannot be read as weights: not a file of tensors alone, as torch.save writes it"
        ) from None
    except (OSError, SafetensorError, RuntimeError, ValueError) as problem:
        reason = (str(problem).splitlines() or [type(problem).__name__])[0][:100]
        raise UserError(
            f"{path}: cannot be read as weights ({reason}); give the published .pth or .safetensors"
        ) from None
    for wrapping in ("model", "state_dict", "ema_model", "inited_model"):
        if isinstance(content, dict) and isinstance(content.get(wrapping), dict):
            content = content[wrapping]
            break
    tensors = (
        {key: value for key, value in content.items() if isinstance(value, torch.Tensor)}
        if isinstance(content, dict)
        else {}
    )
    tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    if any(key.startswith("teacher.") for key in tensors):  # Semi-DETR, both networks and the projector
        if part not in ("teacher", "student"):
            raise UserError(f"{path}: holds a teacher and a student; part must be one of them, got {part!r}")
        chosen = {key: value for key, value in tensors.items() if key.startswith(f"{part}.")}
        ignored = [key for key in tensors if key not in chosen]
        return {key.removeprefix(f"{part}."): value for key, value in chosen.items()}, ignored
    return tensors, []


def _translate(tensors: dict, table: dict[str, str]) -> tuple[dict, list[str], dict]:
    """their name -> our name, names no table knows, and the tensors under our names."""
    rules = [
        (re.compile(re.escape(theirs).replace(r"\#", r"(\d+)").replace(r"\*", "(?P<rest>.+)")), ours)
        for theirs, ours in table.items()
    ]
    mapped, unmapped, values = {}, [], {}
    for key, value in tensors.items():
        found = next(((match, ours) for rule, ours in rules if (match := rule.fullmatch(key))), None)
        if found is None or key.endswith("num_batches_tracked"):
            unmapped.append(key)
            continue
        match, ours = found
        rest = match.groupdict().get("rest", "")
        for number in match.groups()[: ours.count("#")]:
            ours = ours.replace("#", number, 1)
        ours = ours.replace("*", rest)
        mapped[key] = ours
        pieces = value.chunk(ours.count("|") + 1, dim=-1) if "|" in ours else [value]
        values |= dict(zip(ours.split("|"), pieces, strict=True))
    for key in [key for key in values if key.endswith("@q")]:
        name = key.removesuffix("@q")
        parts = [values.pop(f"{name}@{part}", None) for part in "qkv"]
        if all(part is not None for part in parts):
            values[name] = torch.cat(parts)
    return mapped, unmapped, values


def _repeat_tied_heads(values: dict, own: dict) -> None:
    """Hugging Face writes tied class heads once."""
    for key in own:
        if key.startswith("class_heads.") and key not in values:
            first = f"class_heads.0.{key.split('.', 2)[2]}"
            if first in values:
                values[key] = values[first]


def _class_rows(key: str, value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """COCO's 80 rows of 91 (or more), and the rows behind the classes, where our detector has those alone."""
    if not key.startswith(CLASS_ROWS) or len(value) == len(own):
        return value
    if len(value) in (91, 92) and len(own) in (80, 81):
        return value[COCO_IDS + [91] * (len(own) - 80)]
    if key.startswith("denoising") and len(value) > len(own):
        return value[: len(own)]
    return value

"""Folds of labelled and unlabelled images, as files under their usual names.

    python data_scripts/make_splits.py data/coco/annotations/instances_train2017.json
        writes annotations/semi_supervised/instances_train2017.{fold}@{percent}.json (labelled, with
        boxes) and instances_train2017.{fold}@{percent}-unlabeled.json (the rest) for 1, 2, 5, 10 %
        and folds 1 to 5, and manifest.json; outlines ("segmentation") are left out
    ... --percent 10 --fold 1
        these alone; each may be repeated
    ... --stratified
        small data: every class gets its fraction, the rare ones first
    ... --indices COCO_supervision.txt
        folds as Unbiased Teacher published them
    ... --pairs FOLDER
        folds that others published as pairs of such jsons
    python data_scripts/make_splits.py --check data/coco/annotations/semi_supervised
        compare the files with their manifest

Without an option the draw is that of `semidetr train --no-stratified --percent P --fold F` (the
COCO and VOC presets draw so), with --stratified that of one's own data: both call the same
functions, so a fold on disk and one drawn in training have the same images where every image is
labelled. The -unlabeled.json hold
no boxes: their truth cannot leak.

The manifest has the SHA-256 of every file and of the json they were drawn from, the counts, the
seed, the generator and its versions. NumPy may change its stream of random numbers in a later
version: then the files are the fold, and semidetr_lite.data.folds reads them. It has no date: the
same folds give the same manifest, byte for byte.

Index lists, {percent: {fold: [index]}}, count the images as detectron2 lists them: sorted by id,
images without a box that is no crowd region left out first. (Unbiased Teacher's lists fit that:
0.1 % are 117 indices, of 117,266 images; of all 118,287 it would be 118.) Each list is checked to
be as long as its percentage of that count. The images left out go to the unlabelled part here,
since leaving them out would use their labels; there they are in neither.
"""

import argparse
import os
import sys
from collections.abc import Collection
from pathlib import Path

import numpy as np
from _script import run

import semidetr_lite
from semidetr_lite.data.coco_json import read_coco, read_coco_json
from semidetr_lite.data.folds import check_manifest
from semidetr_lite.data.splits import SEED, labelled_indices, stratified_indices
from semidetr_lite.errors import UserError
from semidetr_lite.files import file_digest, read_json, write_json

PERCENTS = (1.0, 2.0, 5.0, 10.0)
FOLDS = (1, 2, 3, 4, 5)
Fold = tuple[float, int]  # percentage, number
Drawn = dict[Fold, list[int]]  # indices into the json's list of images: the labelled ones


def main(argv=None) -> int:
    """Write or check the folds; the exit status is 0, or 2 after one line about what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, nargs="?", help="the COCO json to split")
    parser.add_argument(
        "--percent", type=float, action="append", help="of the images that are labelled"
    )
    parser.add_argument("--fold", type=int, action="append", help="number of the draw, from 1")
    parser.add_argument(
        "--out", type=Path, help="folder of the files (default: semi_supervised beside the json)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--stratified",
        action="store_true",
        help="every class gets its fraction of the labelled images",
    )
    source.add_argument(
        "--indices", type=Path, metavar="FILE", help="read index lists that others published"
    )
    source.add_argument(
        "--pairs", type=Path, metavar="FOLDER", help="read pairs of jsons that others published"
    )
    source.add_argument(
        "--check", type=Path, metavar="FOLDER", help="only check the manifest there"
    )
    options = parser.parse_args(argv)
    if (options.json is None) == (options.check is None):
        parser.error("give the COCO json to split, or --check a folder of folds")
    if options.check:
        return run(_check, options.check)
    return run(_write, options)


def _check(folder: Path) -> None:
    count = len(check_manifest(folder)["files"])
    print(f"{folder}: {count} files are what the manifest says")


def _write(options: argparse.Namespace) -> None:
    """Write the folds and their manifest, or find that they are there already."""
    source = options.json
    out = options.out or source.parent / "semi_supervised"
    document = read_coco(source)
    drawn, generator = _draw(options, document)
    manifest = _manifest(source, out, document, generator)
    if (out / "manifest.json").exists():
        _check_same(out, manifest, set(drawn))
        print(f"{out}: these folds are there already")
        return
    files = {}
    for (percent, fold), labelled in sorted(drawn.items()):
        pair = make_pair(document, labelled, source.stem, percent, fold)
        for name, part in pair.items():
            write_json(out / name, part)
            files[name] = {
                "sha256": file_digest(out / name),
                "percent": percent,
                "fold": fold,
                "labelled": not name.endswith("-unlabeled.json"),
                "images": len(part["images"]),
                "boxes": len(part["annotations"]),
            }
    write_json(out / "manifest.json", {**manifest, "files": files})
    print(f"{out}: {len(files)} files and manifest.json")
    _warn_about_absent_classes(document, drawn, generator)


def _manifest(source: Path, out: Path, document: dict, generator: str) -> dict:
    """The manifest without its "files"."""
    tables = ("images", "annotations", "categories")
    return {
        "generator": generator,
        "versions": {"semidetr_lite": semidetr_lite.__version__, "numpy": np.__version__},
        "seed": SEED if generator in ("uniform", "stratified") else None,
        "source": {
            "file": Path(os.path.relpath(source.resolve(), out.resolve())).as_posix(),
            "sha256": file_digest(source),
            **{table: len(document[table]) for table in tables},
        },
    }


def _warn_about_absent_classes(document: dict, drawn: Drawn, generator: str) -> None:
    """One line on stderr if a class has boxes, but none in the labelled images of a fold."""
    absent = {}
    for (percent, fold), labelled in sorted(drawn.items()):
        names = absent_classes(document, labelled)
        if names:
            absent[f"{percent:g} % fold {fold}"] = names
    if not absent:
        return
    fold_name, names = next(iter(absent.items()))
    listed = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
    count = f"{len(absent)} of {len(drawn)} folds have classes without a labelled box"
    first = f"(first: {fold_name}, {len(names)} classes: {listed})"
    advice = "" if generator == "stratified" else "; --stratified helps"
    print(f"warning: {count} {first}{advice}", file=sys.stderr)


def _check_same(out: Path, manifest: dict, drawn: set[Fold]) -> None:
    """Raise UserError unless the folds in `out` are whole and are those wanted."""
    existing = check_manifest(out)
    folds = {(row["percent"], row["fold"]) for row in existing["files"].values()}
    same = all(existing.get(key) == manifest[key] for key in ("generator", "seed", "source"))
    if not same or folds != drawn:
        difference = "another json, generator, percentage or fold"
        raise UserError(f"{out}: holds other folds ({difference}); give another --out")


def make_pair(
    document: dict, labelled: list[int], stem: str, percent: float, fold: int
) -> dict[str, dict]:
    """{file name: COCO document} of the labelled and the unlabelled part of the images."""
    images = document["images"]
    labelled_images = [images[index] for index in sorted(labelled)]
    labelled_ids = {image["id"] for image in labelled_images}
    others = [image for image in images if image["id"] not in labelled_ids]
    boxes = [row for row in document["annotations"] if row["image_id"] in labelled_ids]
    categories = document["categories"]
    name = f"{stem}.{fold}@{percent:g}"
    return {
        f"{name}.json": {
            "images": labelled_images,
            "annotations": boxes,
            "categories": categories,
        },
        f"{name}-unlabeled.json": {
            "images": others,
            "annotations": [],
            "categories": categories,
        },
    }


def absent_classes(document: dict, labelled: list[int]) -> list[str]:
    """The names of the classes that have boxes, but none in the labelled images."""
    classes = classes_of(document)
    present = set().union(*(classes[index] for index in labelled))
    absent = set().union(*classes) - present
    return sorted(row["name"] for row in document["categories"] if row["id"] in absent)


# Which images are labelled


def _draw(options: argparse.Namespace, document: dict) -> tuple[Drawn, str]:
    """The folds wanted, and the name of what made them."""
    percents = options.percent or PERCENTS
    folds = options.fold or FOLDS
    if min(folds) < 1:
        raise UserError(f"--fold counts from 1, got {min(folds)}")
    wanted = [(percent, fold) for percent in percents for fold in folds]
    all_needed = bool(options.percent)  # the default percentages may lack, named ones may not
    if options.indices:
        return read_indices(options.indices, document, wanted, all_needed), options.indices.name
    if options.pairs:
        stem = options.json.stem
        return read_pairs(options.pairs, document, stem, wanted, all_needed), "json pairs"
    if options.stratified:
        classes = classes_of(document)
        return {(p, f): stratified_indices(classes, p, f) for p, f in wanted}, "stratified"
    count = len(document["images"])
    return {(p, f): labelled_indices(count, p, f) for p, f in wanted}, "uniform"


def classes_of(document: dict) -> list[set[int]]:
    """The category ids of the boxes of each image, without those of crowd regions."""
    classes = {image["id"]: set() for image in document["images"]}
    for row in document["annotations"]:
        if not row.get("iscrowd"):
            classes[row["image_id"]].add(row["category_id"])
    return list(classes.values())


def read_indices(path: Path, document: dict, wanted: list[Fold], all_needed: bool) -> Drawn:
    """Folds from a json {percent: {fold: [index]}} of published index lists.

    Raises UserError for a file of another form, a list of another length than its percentage, and
    with `all_needed` for a fold that is not in it.
    """
    lists = _index_lists(path)
    images = document["images"]
    classes = classes_of(document)
    with_boxes = [index for index in range(len(images)) if classes[index]]
    with_boxes.sort(key=lambda index: images[index]["id"])  # as detectron2 lists them
    drawn = {}
    for percent, fold in _existing(path, wanted, lists, all_needed):
        indices = lists[percent, fold]
        expected = int(percent / 100 * len(with_boxes))
        name = f"{percent:g} % fold {fold}"
        if not isinstance(indices, list) or len(indices) != expected:
            problem = f"{name} is no list of {expected} indices"
            raise UserError(f"{path}: {problem}, as of {len(with_boxes)} images with boxes")
        valid = all(type(index) is int and 0 <= index < len(with_boxes) for index in indices)
        if not valid or len(set(indices)) < expected:
            limit = len(with_boxes) - 1
            problem = f"{name} has an index twice, or one that is not from 0 to {limit}"
            raise UserError(f"{path}: {problem}")
        drawn[percent, fold] = sorted(with_boxes[index] for index in indices)
    return drawn


def _index_lists(path: Path) -> dict[Fold, list]:
    """{(percent, fold): what the file has there}. Raises UserError for a file of another form."""
    lists = read_json(path)
    if not isinstance(lists, dict) or not all(isinstance(row, dict) for row in lists.values()):
        form = "a json of {percent: {fold: [index, ...]}}"
        raise UserError(f"{path}: not index lists, {form}")
    try:
        return {
            (float(percent), int(fold)): indices
            for percent, folds in lists.items()
            for fold, indices in folds.items()
        }
    except ValueError:
        problem = "its keys must be a percentage and a fold, both numbers"
        raise UserError(f"{path}: {problem}") from None


def read_pairs(
    folder: Path, document: dict, stem: str, wanted: list[Fold], all_needed: bool
) -> Drawn:
    """Folds from the image ids of STEM.{fold}@{percent}.json and -unlabeled.json.

    Boxes come from `document`. An image in neither part becomes unlabelled, and a line on stderr
    counts them. Raises UserError for an id that `document` does not have, for an image in both
    parts, and with `all_needed` for a fold that is not there.
    """
    index_of = {image["id"]: index for index, image in enumerate(document["images"])}
    names = {(percent, fold): f"{stem}.{fold}@{percent:g}" for percent, fold in wanted}
    on_disk = {key for key, name in names.items() if (folder / f"{name}.json").is_file()}
    drawn = {}
    for key in _existing(folder, wanted, on_disk, all_needed):
        path = folder / f"{names[key]}.json"
        labelled = _image_ids(path, index_of)
        unlabelled = _image_ids(folder / f"{names[key]}-unlabeled.json", index_of)
        if not labelled:
            raise UserError(f"{path}: has no image")
        if labelled & unlabelled:
            count = len(labelled & unlabelled)
            raise UserError(f"{path}: {count} of its images are also unlabelled")
        neither = len(index_of) - len(labelled | unlabelled)
        if neither:
            message = f"{neither} images in neither part are taken as unlabelled"
            print(f"warning: {names[key]}: {message}", file=sys.stderr)
        drawn[key] = sorted(index_of[image_id] for image_id in labelled)
    return drawn


def _image_ids(path: Path, known: dict[int, int]) -> set[int]:
    """The ids of the images in a json.

    Raises UserError for one that is not among the known ones.
    """
    try:
        ids = [image["id"] for image in read_coco_json(path)["images"]]
        unknown = [image_id for image_id in ids if image_id not in known]
    except (TypeError, KeyError):
        problem = 'it has no list "images" with ids'
        raise UserError(f"{path}: not COCO's format: {problem}") from None
    if unknown:
        problem = f"{len(unknown)} of its images are not in the json to split"
        raise UserError(f"{path}: {problem}, first id {unknown[0]}")
    return set(ids)


def _existing(
    path: Path, wanted: list[Fold], existing: Collection[Fold], all_needed: bool
) -> list[Fold]:
    """The wanted folds that exist.

    Raises UserError for none, and with `all_needed` for one that is missing.
    """
    there = [key for key in wanted if key in existing]
    missing = [key for key in wanted if key not in existing]
    if not there or (all_needed and missing):
        percent, fold = missing[0]
        raise UserError(f"{path}: has no fold {fold} of {percent:g} %")
    return there


if __name__ == "__main__":
    sys.exit(main())

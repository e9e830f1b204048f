"""Folds of labelled and unlabelled images, as files under the names that semi-supervised detection code agrees on.

    python data_scripts/make_splits.py data/coco/annotations/instances_train2017.json
        writes annotations/semi_supervised/instances_train2017.{fold}@{percent}.json (labelled, with boxes) and
        instances_train2017.{fold}@{percent}-unlabeled.json (the rest) for 1, 2, 5, 10 % and folds 1 to 5, and
        manifest.json; outlines ("segmentation") are left out
    ... --percent 10 --fold 1                     these alone; each may be repeated
    ... --stratified                              small data: every class gets its share, the rare ones first
    ... --indices COCO_supervision.txt            folds as Unbiased Teacher published them
    ... --pairs FOLDER                            folds others published as pairs of such jsons
    python data_scripts/make_splits.py --check data/coco/annotations/semi_supervised

Without an option the draw is that of `semidetr train --percent P --fold F`: both call the same function, so a fold on
disk and one drawn in training are the same images. The -unlabeled.json hold no boxes: their truth cannot leak.

The manifest has the SHA-256 of every file and of the json they were drawn from, the counts, the seed, the generator and
its versions. NumPy may change its stream of random numbers in a later version: then the files are the fold, and
semidetr_lite.data.folds reads them. It has no date: the same folds give the same manifest, byte for byte.

Index lists, {percent: {fold: [index]}}, count the images as detectron2 lists them: sorted by id, images without a box
that is no crowd left out first. (Unbiased Teacher's lists fit that: 0.1 % are 117 indices, of 117,266 images; of all
118,287 it would be 118.) Each list is checked to be as long as its percentage of that count. The images left out go to
the unlabelled part here, since leaving them out would use their labels; there they are in neither.
"""

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from _script import run, write_json

import semidetr_lite
from semidetr_lite.data.coco import read_coco, read_json
from semidetr_lite.data.folds import check_manifest, sha256
from semidetr_lite.data.splits import SEED, labelled_indices
from semidetr_lite.errors import UserError

PERCENTS, FOLDS = (1.0, 2.0, 5.0, 10.0), (1, 2, 3, 4, 5)
Drawn = dict[tuple[float, int], list[int]]  # {(percent, fold): places of the labelled images in the json's list}


def main(argv=None) -> int:
    """Write or check the folds; the exit status is 0, or 2 after one line about what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="?", help="the COCO json to split")
    parser.add_argument("--percent", type=float, action="append", help="of the images that are labelled")
    parser.add_argument("--fold", type=int, action="append", help="number of the draw, from 1")
    parser.add_argument("--out", type=Path, help="folder of the files (default: semi_supervised beside the json)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--stratified", action="store_true", help="every class gets its share of the labelled images")
    how.add_argument("--indices", type=Path, metavar="FILE", help="read index lists others published")
    how.add_argument("--pairs", type=Path, metavar="FOLDER", help="read pairs of jsons others published")
    how.add_argument("--check", type=Path, metavar="FOLDER", help="only check the manifest there")
    options = parser.parse_args(argv)
    if (options.json is None) == (options.check is None):
        parser.error("give the COCO json to split, or --check a folder of folds")
    return run(_check, options.check) if options.check else run(_work, options)


def _check(folder: Path) -> None:
    print(f"{folder}: {len(check_manifest(folder)['files'])} files are what the manifest says")


def _work(options) -> None:
    source, out = options.json, options.out or options.json.parent / "semi_supervised"
    document = read_coco(source)
    drawn, generator = _draw(options, document)
    manifest = {
        "generator": generator,
        "versions": {"semidetr_lite": semidetr_lite.__version__, "numpy": np.__version__},
        "seed": SEED if generator in ("uniform", "stratified") else None,
        "source": {
            "file": Path(os.path.relpath(source.resolve(), out.resolve())).as_posix(),
            "sha256": sha256(source),
            **{part: len(document[part]) for part in ("images", "annotations", "categories")},
        },
    }
    if (out / "manifest.json").exists():
        _check_same(out, manifest, set(drawn))
        print(f"{out}: these folds are there already")
        return
    files, absent = {}, {}
    for (percent, fold), chosen in sorted(drawn.items()):
        for name, part in pair(document, chosen, source.stem, percent, fold).items():
            write_json(out / name, part)
            files[name] = {
                "sha256": sha256(out / name),
                "percent": percent,
                "fold": fold,
                "labelled": not name.endswith("-unlabeled.json"),
                "images": len(part["images"]),
                "boxes": len(part["annotations"]),
            }
        absent |= {f"{percent:g} % fold {fold}": names for names in [absent_classes(document, chosen)] if names}
    write_json(out / "manifest.json", {**manifest, "files": files})
    print(f"{out}: {len(files)} files and manifest.json")
    for name, names in list(absent.items())[:1]:
        listed = ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
        advice = "" if generator == "stratified" else "; --stratified helps"
        known = f"{len(absent)} of {len(drawn)} folds have classes without a labelled box"
        print(f"warning: {known} (first: {name}, {len(names)} classes: {listed}){advice}", file=sys.stderr)


def _check_same(out: Path, manifest: dict, drawn: set) -> None:
    """Raise UserError unless the folds in `out` are whole and are those asked for, versions apart."""
    there = check_manifest(out)
    pairs = {(row["percent"], row["fold"]) for row in there["files"].values()}
    same = all(there.get(key) == manifest[key] for key in ("generator", "seed", "source"))
    if not same or pairs != drawn:
        raise UserError(f"{out}: holds other folds (another json, generator, percentage or fold); give another --out")


def pair(document: dict, chosen: list[int], stem: str, percent: float, fold: int) -> dict[str, dict]:
    """{file name: COCO document} of the labelled and the unlabelled part, the second without annotations."""
    labelled = set(chosen)
    ids = {document["images"][index]["id"] for index in labelled}
    name = f"{stem}.{fold}@{percent:g}"
    images = document["images"]
    return {
        f"{name}.json": {
            "images": [images[index] for index in sorted(labelled)],
            "annotations": [row for row in document["annotations"] if row["image_id"] in ids],
            "categories": document["categories"],
        },
        f"{name}-unlabeled.json": {
            "images": [image for index, image in enumerate(images) if index not in labelled],
            "annotations": [],
            "categories": document["categories"],
        },
    }


def absent_classes(document: dict, chosen: list[int]) -> list[str]:
    """The names of the classes that have boxes, but none in the labelled part: a detector cannot learn them there."""
    classes = classes_of(document)
    absent = set().union(*classes) - set().union(*(classes[index] for index in chosen))
    return sorted(row["name"] for row in document["categories"] if row["id"] in absent)


# Which images are labelled


def _draw(options, document: dict) -> tuple[Drawn, str]:
    """The folds asked for, and the name of what made them."""
    percents, folds = options.percent or PERCENTS, options.fold or FOLDS
    if min(folds) < 1:
        raise UserError(f"--fold counts from 1, got {min(folds)}")
    wanted = [(percent, fold) for percent in percents for fold in folds]
    count = len(document["images"])
    if options.indices:
        return read_indices(options.indices, document, wanted, asked=bool(options.percent)), options.indices.name
    if options.pairs:
        return read_pairs(options.pairs, document, options.json.stem, wanted, asked=bool(options.percent)), "json pairs"
    if options.stratified:
        classes = classes_of(document)
        return {(p, f): stratified_indices(classes, p, f) for p, f in wanted}, "stratified"
    return {(p, f): labelled_indices(count, p, f) for p, f in wanted}, "uniform"


def classes_of(document: dict) -> list[set[int]]:
    """The category ids of the boxes of each image, crowd regions aside, in the order of the images."""
    found = {image["id"]: set() for image in document["images"]}
    for row in document["annotations"]:
        if not row.get("iscrowd"):
            found[row["image_id"]].add(row["category_id"])
    return list(found.values())


def stratified_indices(classes: list[set[int]], percent: float, fold: int) -> list[int]:
    """As many sorted indices as `labelled_indices` draws, so that each class gets its share of them.

    `classes` holds the class ids of each image. A class that is on n images is wanted on percent % of n, at least on
    one; images without any count as one more class, without that least. From the rarest class to the most frequent,
    images that have it are taken until it has its share: in the fold's random order, but first those that put no other
    class over its own share. Equally rare classes come in a random order. The last places go to images in that order.
    """
    count = len(labelled_indices(len(classes), percent, fold))
    rng = np.random.default_rng([fold, SEED])
    order = rng.permutation(len(classes)).tolist()
    strata = [of_image or {None} for of_image in classes]
    frequency = Counter(stratum for of_image in strata for stratum in of_image)
    share = {one: max(one is not None, round(images * percent / 100)) for one, images in frequency.items()}
    chosen, reached = set(), Counter()
    ties = dict(zip(sorted(set().union(*classes)), rng.random(len(share))))
    for stratum in sorted(share, key=lambda one: (one is None, frequency[one], ties.get(one))):
        having = [index for index in order if stratum in strata[index] and index not in chosen]
        for index in sorted(having, key=lambda place: any(reached[one] >= share[one] for one in strata[place])):
            if reached[stratum] >= share[stratum] or len(chosen) == count:
                break
            chosen.add(index)
            reached.update(strata[index])
    rest = [index for index in order if index not in chosen]
    return sorted([*chosen, *rest[: count - len(chosen)]])


def read_indices(path: Path, document: dict, wanted: list, asked: bool) -> Drawn:
    """Folds from a json {percent: {fold: [index]}}; percentages it lacks are an error only if they were `asked` for."""
    lists = read_json(path)
    if not isinstance(lists, dict) or not all(isinstance(folds, dict) for folds in lists.values()):
        raise UserError(f"{path}: not index lists, a json of {{percent: {{fold: [index, ...]}}}}")
    try:
        lists = {(float(p), int(f)): indices for p, folds in lists.items() for f, indices in folds.items()}
    except ValueError:
        raise UserError(f"{path}: its keys must be a percentage and a fold, both numbers") from None
    images = document["images"]
    classes = classes_of(document)
    places = sorted((place for place in range(len(images)) if classes[place]), key=lambda place: images[place]["id"])
    drawn = {}
    for percent, fold in _there(path, wanted, lists, asked):
        indices, expected = lists[percent, fold], int(percent / 100 * len(places))
        name = f"{percent:g} % fold {fold}"
        if not isinstance(indices, list) or len(indices) != expected:
            raise UserError(f"{path}: {name} is no list of {expected} indices, as of {len(places)} images with boxes")
        if len(set(indices)) < expected or not all(type(i) is int and 0 <= i < len(places) for i in indices):
            raise UserError(f"{path}: {name} has an index twice, or one that is not from 0 to {len(places) - 1}")
        drawn[percent, fold] = sorted(places[index] for index in indices)
    return drawn


def read_pairs(folder: Path, document: dict, stem: str, wanted: list, asked: bool) -> Drawn:
    """Folds from STEM.{fold}@{percent}.json and -unlabeled.json, by their image ids; boxes come from the json split.

    An image in neither part goes to the unlabelled one, and a line on stderr counts them. Raises UserError for an id
    the json has not and for an image in both parts.
    """
    place = {image["id"]: index for index, image in enumerate(document["images"])}
    names = {(p, f): f"{stem}.{f}@{p:g}" for p, f in wanted}
    there = {one for one, name in names.items() if (folder / f"{name}.json").is_file()}
    drawn = {}
    for one in _there(folder, wanted, there, asked):
        labelled, unlabelled = (_ids(folder / f"{names[one]}{end}.json", place) for end in ("", "-unlabeled"))
        if not labelled or labelled & unlabelled:
            fault = f"{len(labelled & unlabelled)} of its images are also unlabelled" if labelled else "has no image"
            raise UserError(f"{folder / names[one]}.json: {fault}")
        neither = len(place) - len(labelled | unlabelled)
        if neither:
            print(f"warning: {names[one]}: {neither} images in neither part are taken as unlabelled", file=sys.stderr)
        drawn[one] = sorted(place[image_id] for image_id in labelled)
    return drawn


def _ids(path: Path, known: dict) -> set[int]:
    try:
        ids = [image["id"] for image in read_json(path)["images"]]
        unknown = [image_id for image_id in ids if image_id not in known]
    except (TypeError, KeyError):
        raise UserError(f'{path}: not COCO\'s format: it has no list "images" with ids') from None
    if unknown:
        raise UserError(f"{path}: {len(unknown)} of its images are not in the json to split, first id {unknown[0]}")
    return set(ids)


def _there(path: Path, wanted: list, there, asked: bool) -> list[tuple[float, int]]:
    """The wanted folds that are there. Raises UserError for one that is not although it was asked for, and for none."""
    found = [one for one in wanted if one in there]
    missing = [one for one in wanted if one not in there]
    if not found or (asked and missing):
        percent, fold = missing[0]
        raise UserError(f"{path}: has no fold {fold} of {percent:g} %")
    return found


if __name__ == "__main__":
    sys.exit(main())

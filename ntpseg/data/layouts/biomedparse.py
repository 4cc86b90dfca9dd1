"""BiomedParse's layout: ``train/``, ``train_mask/`` and ``train.json``, the same for val and test; or no JSON at all.

After https://github.com/microsoft/BiomedParse: its README (v1, "File Name Convention"), its script
``create-customer-datasets.py``, which writes the JSON files, and its reader of v2 (``assets/readmes/2D.md``). An image
is ``IMAGE_MODALITY_SITE.png`` and a mask ``IMAGE_MODALITY_SITE_TARGET.png``, where ``+`` stands for a space. The JSON
file has the keys ``images`` and ``annotations``; an annotation has a ``mask_file``, an ``image_id`` or a ``file_name``,
and ``sentences``, a list of objects with ``raw`` or ``sent``. Without the JSON file a sentence is made of the names, as
that script does: "left heart ventricle in heart MRI".
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ntpseg.data import problems
from ntpseg.data.layouts.annotations import SPLIT_NAMES, Pairs, SplitFiles, name_of, read_json, texts_of
from ntpseg.data.layouts.base import Layout, Listing
from ntpseg.data.layouts.folders import find_subfolder
from ntpseg.data.layouts.manifest import NAMES, find_manifest
from ntpseg.data.records import known_suffix, subject_of

# Slices of one volume: coronacases_003_123 is slice 123 of patient coronacases_003. In other modalities the last number
# is the image's own (covid_1585_X-Ray_chest), and so it is in amos_0001, where no number would be left.
_SLICE = re.compile(r"(.*\d.*)[_-]\d+")
_VOLUMETRIC = ("ct", "mr", "pet")


def matches_biomedparse(root: Path) -> bool:
    """Whether `root` has ``train`` beside ``train_mask`` (or val, test), and no table that says more."""
    splits = _splits(root)
    if not splits or any((root / name).is_file() for name in NAMES):
        return False
    return any(_json(root, name) is not None for name in splits.values()) or find_manifest(root) is None


def read_biomedparse(root: Path) -> Listing:
    """List a data set in BiomedParse's layout; opens its JSON files, but no image.

    Every sentence of an annotation is a pair of its own. A split without a JSON file is read by its file names.

    Args:
        root: the folder that holds ``train`` and ``train_mask``.

    Raises:
        ValueError: it holds no such folders.
    """
    splits = _splits(root)
    if not splits:
        raise ValueError(f"path must hold train and train_mask, val or test in BiomedParse's layout, got {root}")
    listing = Listing(root)
    for split, name in splits.items():
        pairs = Pairs(split, SplitFiles(root / name), SplitFiles(root / f"{name}_mask"), listing)
        path = _json(root, name)
        if path is None:
            _read_names(pairs)
            continue
        try:
            content = read_json(path)
            if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
                raise ValueError(
                    "no list of annotations; BiomedParse's JSON files have the keys images and annotations"
                )
        except ValueError as error:
            listing.report(problems.UNREADABLE, split, path, f"it must be a JSON file of annotations, got {error}")
        else:
            _read_annotations(pairs, path.name, content)
    return listing


def describe_name(mask: str) -> str:
    """The sentence that a mask's file name stands for.

    ``08_MRI_heart_left+heart+ventricle.png`` is "left heart ventricle in heart MRI". A name with fewer parts has the
    target alone.
    """
    parts = mask.removesuffix(known_suffix(mask)).replace("+", " ").rsplit("_", 3)
    if len(parts) < 4:
        return parts[-1].strip()
    _, modality, site, target = (part.strip() for part in parts)
    return f"{target} in {site} {modality}"


def subject_of_image(image: str) -> str:
    """The subject of ``IMAGE_MODALITY_SITE.png``: what `subject_of` finds in IMAGE, else IMAGE; slices of one CT, MR or
    PET, which end in their number, share one."""
    stem = image.replace("\\", "/").rsplit("/", 1)[-1]
    stem = stem.removesuffix(known_suffix(stem))
    parts = stem.rsplit("_", 2)
    if len(parts) < 3:
        return subject_of(stem)
    name, modality, _ = parts
    if (subject := subject_of(name)) != name:
        return subject
    match = _SLICE.fullmatch(name) if modality.casefold().startswith(_VOLUMETRIC) else None
    return match.group(1) if match else name


def _splits(root: Path) -> dict[str, str]:
    """By split, the name of its folder as it is written there."""
    found: dict[str, str] = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            images = find_subfolder(root, (name,))
            if images is not None and split not in found and (root / f"{images.name}_mask").is_dir():
                found[split] = images.name
    return found


def _json(root: Path, name: str) -> Path | None:
    path = root / f"{name}.json"
    return path if path.is_file() else None


def _read_annotations(pairs: Pairs, name: str, content: dict[str, Any]) -> None:
    images = {str(i.get("id")): name_of(i.get("file_name")) for _, i in pairs.entries(name, content.get("images"))}
    for place, annotation in pairs.entries(name, content["annotations"]):
        image = name_of(annotation.get("file_name")) or images.get(str(annotation.get("image_id")), "")
        # Without mask_file the mask has the image's name, as in BiomedParse's own reader.
        mask = name_of(annotation.get("mask_file")) or image
        pairs.add(
            f"{name} annotation {place} {mask}", image, mask, _sentences(annotation), subject_of_image(image or mask)
        )
    pairs.finish(name)


def _sentences(annotation: dict[str, Any]) -> list[str]:
    sentences = annotation.get("sentences")
    items = sentences if isinstance(sentences, list) else [sentences]
    return [
        text
        for item in items
        for text in texts_of((item.get("raw") or item.get("sent")) if isinstance(item, dict) else item)
    ]


def _read_names(pairs: Pairs) -> None:
    images = pairs.images.all()
    folders = pairs.images.folder, pairs.masks.folder
    cases = {path.name.removesuffix(known_suffix(path.name)): path for path in reversed(images)}
    without = dict.fromkeys(images)
    for mask in pairs.masks.all():
        stem, _, target = mask.name.removesuffix(known_suffix(mask.name)).rpartition("_")
        image = cases.get(stem)
        if image is None or not target:
            detail = f"no image {stem or 'IMAGE_MODALITY_SITE'} in {pairs.listing.short(pairs.images.folder)}"
            pairs.listing.report(problems.UNMATCHED_MASK, pairs.split, mask, detail)
            continue
        without.pop(image, None)
        names = [path.relative_to(place).as_posix() for path, place in ((image, folders[0]), (mask, folders[1]))]
        pairs.add(
            pairs.listing.short(mask), names[0], names[1], [describe_name(mask.name)], subject_of_image(image.name)
        )
    for image in without:
        stem = image.name.removesuffix(known_suffix(image.name))
        detail = f"no {stem}_TARGET in {pairs.listing.short(pairs.masks.folder)}"
        pairs.listing.report(problems.MISSING_MASK, pairs.split, image, detail)
    pairs.finish()


BIOMEDPARSE = Layout("biomedparse", matches_biomedparse, read_biomedparse, "train/ and train_mask/")

"""The demo's CT as NIfTI, as DICOM and as PNG slices: equal predictions, and their Dice against the CT's labels.

    python -m benchmarks.volume_ct --model RUN

RUN is what `make demo` trains. The CT is cut to the body, as the training images were. Every block of
four slices that the demo holds out for testing was never trained on; all other blocks were, so only "test" says how
well the model does, and even that on the one patient that it knows.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ntpseg.data import demo_ct, write_png
from ntpseg.data.demo_structures import STRUCTURES
from ntpseg.generation import PostProcessing, Segmenter, VolumePrediction
from ntpseg.utils.files import write_json
from ntpseg.volumes import Volume
from ntpseg.volumes.reading import read_volume
from ntpseg.volumes.windows import parse_window, render

WINDOW = "lung+soft-tissue+bone"
ORIENTATIONS = ("LAS", "RAS", "PSR")
CHOSEN = ("left-lung", "right-lung", "heart", "aorta", "liver", "spleen", "left-kidney", "vertebra")
_STRUCTURES = tuple(structure for structure in STRUCTURES if structure.name in CHOSEN)
RESULT = Path(__file__).parent / "results" / "volume_ct.json"


def cut_ct() -> tuple[Volume, np.ndarray, dict[str, int]]:
    """The CT cut to the body, its labels ``[D, H, W]`` in LPS, and the label of each structure's name."""
    import nibabel

    hounsfield, labels, names, pixel_mm2 = demo_ct.load_volume()
    box = (slice(None), *demo_ct.body_box(labels, round(demo_ct.MARGIN_MM / pixel_mm2**0.5)))
    header = nibabel.nifti1.Nifti1Image.from_filename(demo_ct.source_folder() / "cxr.nii.gz").header
    column, row, slice_mm = map(float, header.get_zooms())
    voxels = np.ascontiguousarray(hounsfield[box]).astype(np.int16)
    return Volume.from_stored(voxels, np.diag([column, row, slice_mm, 1.0])), labels[box], names


def write_nifti(path: Path, volume: Volume, codes: str) -> Path:
    """The volume with i, j and k turned to `codes`."""
    import nibabel

    image = nibabel.Nifti1Image(volume.voxels.transpose(2, 1, 0), np.diag([-1, -1, 1, 1]) @ volume.geometry.affine)
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.io_orientation(image.affine), nibabel.orientations.axcodes2ornt(tuple(codes))
    )
    nibabel.save(image.as_reoriented(turn), path)
    return path


def write_inputs(folder: Path, volume: Volume) -> dict[str, Path]:
    """The CT as every kind of file; names as in the result."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "volumes"))
    from dicom_files import write_multiframe, write_series

    files = {f"nifti {codes}": write_nifti(folder / f"{codes}.nii.gz", volume, codes) for codes in ORIENTATIONS}
    files["dicom series"] = write_series(folder / "series", volume.voxels, volume.geometry.affine)
    files["dicom multi-frame"] = write_multiframe(folder / "multi.dcm", volume.voxels, volume.geometry.affine)
    return files


def png_masks(segmenter: Segmenter, folder: Path, volume: Volume, texts: Sequence[str]) -> list[np.ndarray]:
    """The masks of the CT's slices, written as PNG and read again."""
    rendered = render(volume, parse_window(WINDOW))
    paths = [folder / f"{index:03d}.png" for index in range(volume.count())]
    for index, path in enumerate(paths):
        write_png(path, rendered.slice(index, "axial"))
    return [
        np.stack([prediction.mask for prediction in segmenter.segment_all(paths, [text] * len(paths))])
        for text in texts
    ]


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Of two masks together; 1 where both are empty."""
    total = int(first.sum()) + int(second.sum())
    return 1.0 if not total else 2.0 * int((first & second).sum()) / total


def auc(confidence: np.ndarray, shown: np.ndarray) -> float | None:
    """How well a slice's confidence tells whether the structure is there: the area under the ROC curve."""
    if shown.all() or not shown.any():
        return None
    first, second = confidence[shown][:, None], confidence[~shown][None]
    return round(float((first > second).mean() + (first == second).mean() / 2), 3)


def scores(
    predictions: Sequence[VolumePrediction], labels: np.ndarray, names: dict[str, int], ml: float
) -> dict[str, dict[str, Any]]:
    """Volumetric Dice of each structure: in its slices, in all, in those held out, and after `PostProcessing`."""
    test = np.array([demo_ct.block_split(index)[1] == "test" for index in range(len(labels))])
    rows = {}
    for structure, prediction in zip(_STRUCTURES, predictions):
        truth = np.isin(labels, demo_ct.label_ids(structure, names))
        shown = np.asarray(truth.any(axis=(1, 2)))
        largest = prediction.mask.copy()
        PostProcessing(largest_component=True).apply(largest, ml)
        rows[structure.name] = {
            "text": prediction.text,
            "ml": round(float(truth.sum()) * ml, 1),
            "predicted_ml": round(float(prediction.mask.sum()) * ml, 1),
            "slices_with_it": int(shown.sum()),
            "slices_predicted": int(prediction.mask.any(axis=(1, 2)).sum()),
            "confidence_auc": auc(prediction.confidence, shown),
            "dice_slices_with_it": round(dice(prediction.mask[shown], truth[shown]), 4),
            "dice": round(dice(prediction.mask, truth), 4),
            "dice_test": round(dice(prediction.mask[test], truth[test]), 4),
            "dice_largest_component": round(dice(largest, truth), 4),
            "dice_test_largest_component": round(dice(largest[test], truth[test]), 4),
        }
    return rows


def main() -> None:
    """Predict from every kind of file, compare, and write the result."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", type=Path, required=True, help="a run of `make demo`")
    options.add_argument("--out", type=Path, default=RESULT)
    args = options.parse_args()
    segmenter = Segmenter.from_pretrained(args.model, dtype="float32")
    volume, labels, names = cut_ct()
    texts = [structure.sentences()[0] for structure in _STRUCTURES]
    ml = abs(float(np.linalg.det(volume.geometry.affine[:3, :3]))) / 1000
    equal: dict[str, bool] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = png_masks(segmenter, folder, volume, texts)
        predictions: list[VolumePrediction] = []
        for kind, path in write_inputs(folder, volume).items():
            read = read_volume(path)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            started = time.perf_counter()
            predictions = segmenter.segment_volume(read, texts, axis="axial", window=WINDOW)
            seconds[kind] = round(time.perf_counter() - started, 1)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            equal[kind] = all((p.mask == mask).all() for p, mask in zip(predictions, expected, strict=True))
            print(
                f"{kind}: equal to PNG {equal[kind]}, {seconds[kind]} s, peak grew by {grown / 1024:.0f} MiB",
                flush=True,
            )
    rows = scores(predictions, labels, names, ml)
    for structure, row in rows.items():
        print(f"{structure:20s} {row['dice_slices_with_it']:.3f} {row['dice']:.3f} {row['dice_largest_component']:.3f}")
    result = {
        "command": "python -m benchmarks.volume_ct --model RUN",
        "model": "a run of `make demo`",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} PyTorch threads",
        "voxels": list(volume.voxels.shape),
        "spacing_mm": [round(value, 4) for value in volume.geometry.spacing],
        "axis": "axial",
        "window": WINDOW,
        "equal_to_png": equal,
        "seconds": seconds,
        "structures": rows,
    }
    write_json(args.out, result)
    sys.exit(0 if all(equal.values()) else 1)


if __name__ == "__main__":
    main()

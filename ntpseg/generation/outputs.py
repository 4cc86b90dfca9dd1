"""Where the masks of a prediction go: names, and the refusal of any that would destroy something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ntpseg.data.records import known_suffix
from ntpseg.generation.folder import Job
from ntpseg.generation.own_outputs import TABLE, OwnOutputs
from ntpseg.utils.outputs import (
    check_distinct,
    check_file,
    check_folder,
    check_name,
    check_not_inputs,
    check_path,
    same_place,
)

# Masks are exact and overlays are drawings of them: only PNG is written, whatever else could hold them without loss.
SUFFIX = ".png"


@dataclass(frozen=True)
class Target:
    """One image to segment, and its files.

    Attributes:
        job: the image and its sentence.
        mask: the mask's file.
        overlay: the overlay's file; None without one.
        has_maps: whether `probability` and `uncertainty` are written.
    """

    job: Job
    mask: Path
    overlay: Path | None
    has_maps: bool = False

    @property
    def probability(self) -> Path:
        """The file of the probability map, beside the mask."""
        return self.mask.with_name(f"{self.mask.stem}_probability{SUFFIX}")

    @property
    def uncertainty(self) -> Path:
        """The file of the entropy map, beside the mask."""
        return self.mask.with_name(f"{self.mask.stem}_uncertainty{SUFFIX}")

    def beside_image(self) -> list[Path]:
        """The mask and, where they are written, its maps."""
        return [self.mask, self.probability, self.uncertainty] if self.has_maps else [self.mask]


def file_target(
    job: Job, out: Path, overlay: Path | None, inputs: Sequence[Path] = (), *, maps: bool = False
) -> Target:
    """The files of a single image.

    Args:
        job: the image.
        out: a ``.png`` file, or a folder: one that exists, or a name without an ending. The mask has the image's name
            there.
        overlay: likewise; None: no overlay.
        inputs: further files that are read.
        maps: also write the probability and its uncertainty.

    Raises:
        ValueError: another ending, a place that cannot be written to, or a file that is an input, the other output or
            no earlier prediction's.
    """
    mask = _file("--out", job, out)
    drawn = None if overlay is None else _file("--overlay", job, overlay)
    for option, path, given in (("--out", mask, out), ("--overlay", drawn, overlay)):
        if path is None or given is None:
            continue
        check_file(option, path, (SUFFIX,))
        # In a folder of images the name of another image's file is not free either.
        beside = path != given and same_place(path.parent, job.image.parent) and path.exists()
        check_not_inputs(option, [path], [job.image, *inputs, *([path] if beside else [])])
    target = Target(job, mask, drawn, maps)
    for path in target.beside_image()[1:]:
        check_name("--out", path.name)
        check_file("--out", path, (SUFFIX,))
        # A mask may take the place of an earlier one, which the user names; these names are made up here.
        among = same_place(path.parent, job.image.parent) and path.exists()
        check_not_inputs("--out", [path], [job.image, *inputs, *([path] if among else [])])
    if drawn is not None:
        _check_overlay(target.beside_image(), [drawn])
    _check_own([target], OwnOutputs())
    return target


def folder_targets(
    jobs: Sequence[Job],
    images: Path,
    out: Path,
    overlay: Path | None,
    inputs: Sequence[Path] = (),
    *,
    maps: bool = False,
) -> list[Target]:
    """The files of a folder's images: ``NAME.png`` in `out` and in `overlay`, and ``predictions.csv`` in `out`.

    Files of an earlier prediction are replaced, each at once and whole, and no others.

    Args:
        jobs: the images, with names as `folder_jobs` gives them.
        images: their folder.
        out: the folder of the masks; made if absent.
        overlay: the folder of the overlays; None: no overlays.
        inputs: further files that are read.
        maps: also write ``NAME_probability.png`` and ``NAME_uncertainty.png`` in `out`.

    Raises:
        ValueError: a folder is a file, is the images' or the other one or cannot be written to, or a file is an input
            or no earlier prediction's.
    """
    for option, folder in (("--out", out), ("--overlay", overlay)):
        if folder is None:
            continue
        check_path(option, folder)
        if folder.is_file() or (not folder.exists() and known_suffix(folder.name)):
            raise ValueError(f"{option} must be a folder where --image is one, got {folder}, a file's name")
        if same_place(folder, images):
            raise ValueError(f"{option} must not be the folder of the images, got {folder}; choose another")
        check_folder(option, folder)
    if overlay is not None and same_place(overlay, out):
        raise ValueError(f"--overlay must not be the folder of the masks, got {overlay}; choose another")
    targets = []
    for job in jobs:
        name = f"{job.name}{SUFFIX}"
        target = Target(job, out / name, None if overlay is None else overlay / name, maps)
        for path in target.beside_image():
            check_name("--image", path.name)
        targets.append(target)
    masks = [path for target in targets for path in target.beside_image()]
    drawn = [target.overlay for target in targets if target.overlay is not None]
    for path in [*masks, *drawn, out / TABLE]:
        if path.is_dir():
            raise ValueError(f"--out must have no folder of a result's name, got {path}; move it away")
    read = [*(p for p in images.iterdir() if p.is_file()), *inputs]
    check_not_inputs("--out", [*masks, out / TABLE], read)
    check_not_inputs("--overlay", drawn, read)
    check_distinct("--out", [*masks, out / TABLE])
    _check_overlay(masks, drawn)
    own = OwnOutputs()
    _check_own(targets, own)
    own.check("--out", out / TABLE)
    return targets


def _file(option: str, job: Job, given: Path) -> Path:
    check_path(option, given)
    if given.is_dir() or (not given.suffix and not given.exists()):
        name = f"{job.name}{SUFFIX}"
        check_name(option, name)
        return given / name
    if given.suffix.lower() != SUFFIX:
        raise ValueError(
            f"{option} must be a folder or end in {SUFFIX}, which keeps every pixel (JPEG and the like do not), "
            f"got {given}"
        )
    return given


def _check_own(targets: Sequence[Target], own: OwnOutputs) -> None:
    for target in targets:
        own.check("--out", target.mask, target.beside_image())
        if target.overlay is not None:
            own.check("--overlay", target.overlay)


def _check_overlay(masks: Sequence[Path], drawn: Sequence[Path]) -> None:
    check_not_inputs("--overlay", drawn, masks)
    check_distinct("--overlay", [*masks, *drawn])

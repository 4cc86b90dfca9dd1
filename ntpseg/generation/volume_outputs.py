"""Where the label volumes of a prediction go: names, and the refusal of any that would destroy something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ntpseg.generation.own_outputs import TABLE, OwnOutputs, is_own_json
from ntpseg.generation.volume_jobs import VolumeJob
from ntpseg.utils.outputs import (
    check_distinct,
    check_file,
    check_folder,
    check_name,
    check_not_inputs,
    check_path,
    is_inside,
    same_place,
)
from ntpseg.volumes.dicom_seg import SUFFIX as DICOM_SUFFIX
from ntpseg.volumes.label_nifti import SUFFIXES as NIFTI_SUFFIXES

FORMATS = ("nii.gz", "nii", "dcm")


@dataclass(frozen=True, slots=True)
class VolumeTarget:
    """One volume to segment, and its files.

    Attributes:
        job: the volume and its sentences.
        labels: the label volume (``.nii.gz``, ``.nii``) or the DICOM-SEG object (``.dcm``).
        has_maps: whether a `probability` of each sentence is written.
    """

    job: VolumeJob
    labels: Path
    has_maps: bool = False

    @property
    def is_dicom(self) -> bool:
        """Whether a DICOM-SEG object is written."""
        return self.labels.suffix.lower() == DICOM_SUFFIX

    @property
    def names(self) -> Path:
        """The file beside it that says which sentence each label is."""
        return self.labels.with_name(f"{self._bare}.json")

    def part(self, number: int) -> Path:
        """The file of sentence `number`, from 1, alone; written where sentences overlap."""
        return self.labels.with_name(f"{self._bare}_{number}{self._ending}")

    def probability(self, number: int) -> Path:
        """The file of the probability of sentence `number`, from 1; NIfTI also beside a DICOM-SEG object."""
        which = f"_{number}" if len(self.job.texts) > 1 else ""
        ending = NIFTI_SUFFIXES[0] if self.is_dicom else self._ending
        return self.labels.with_name(f"{self._bare}_probability{which}{ending}")

    def files(self) -> list[Path]:
        """All files that may be written."""
        numbers = range(1, len(self.job.texts) + 1)
        maps = [self.probability(number) for number in numbers] if self.has_maps else []
        if self.is_dicom:
            return [self.labels, *maps]
        return [self.labels, self.names, *(self.part(number) for number in numbers if len(numbers) > 1), *maps]

    @property
    def _ending(self) -> str:
        return _ending(self.labels)

    @property
    def _bare(self) -> str:
        return self.labels.name[: -len(self._ending)]


def volume_target(
    job: VolumeJob, out: Path, kind: str | None, inputs: Sequence[Path] = (), *, maps: bool = False
) -> VolumeTarget:
    """The files of a single volume.

    Args:
        job: the volume.
        out: a file ending in ``.nii.gz``, ``.nii`` or ``.dcm``, or a folder: one that exists, or a name without an
            ending. There the labels are ``NAME.nii.gz``, or of another `kind`.
        kind: one of `FORMATS`; None: as `out` ends.
        inputs: further files that are read.
        maps: also write the probability of each sentence.

    Raises:
        ValueError: another ending, a place that cannot be written to or inside the folder that is read, or a file that
            is an input or no earlier prediction's.
    """
    check_path("--out", out)
    given = out
    if out.is_dir() or (not out.suffix and not out.exists()):
        out = out / f"{job.name}.{kind or FORMATS[0]}"
    if not _ending(out):
        raise ValueError(
            f"--out must be a folder or end in {', '.join(NIFTI_SUFFIXES)} or {DICOM_SUFFIX} for a volume, got {out}"
        )
    if kind is not None and _ending(out).lower() != f".{kind}":
        raise ValueError(f"--format must be how --out ends, got {kind} for {out}; leave it out")
    target = VolumeTarget(job, out, maps)
    check_file("--out", out)
    if job.volume.is_dir() and is_inside(out.parent, job.volume):
        raise ValueError(f"--out must not be in the folder that is read, got {out}; choose another folder")
    _check([target], inputs)
    # Beside the volume a name that the program makes up may be another file's: another volume's, a scan's sidecar.
    if same_place(out.parent, job.volume.parent):
        made_up = [path for path in target.files() if path.exists() and (path != out or given != out)]
        check_not_inputs("--out", target.files(), [path for path in made_up if not is_own_json(path)])
    OwnOutputs().check("--out", target.labels, target.files())
    return target


def volume_targets(
    jobs: Sequence[VolumeJob],
    folder: Path,
    out: Path,
    kind: str | None,
    inputs: Sequence[Path] = (),
    *,
    maps: bool = False,
) -> list[VolumeTarget]:
    """The files of a folder's volumes: ``NAME.nii.gz`` in `out`, and ``predictions.csv``.

    Args:
        jobs: the volumes, with names as `volume_jobs` gives them.
        folder: their folder.
        out: the folder of the labels; made if absent.
        kind: one of `FORMATS`; None: the first.
        inputs: further files that are read.
        maps: also write the probability of each sentence.

    Raises:
        ValueError: `out` is a file, is the volumes' folder or inside it or cannot be written to, or a file is an input
            or no earlier prediction's.
    """
    check_path("--out", out)
    if out.is_file() or (not out.exists() and _ending(out)):
        raise ValueError(f"--out must be a folder where --image is one with several volumes, got {out}, a file's name")
    if same_place(out, folder) or any(job.volume.is_dir() and is_inside(out, job.volume) for job in jobs):
        raise ValueError(f"--out must not be in a folder that is read, got {out}; choose another folder")
    check_folder("--out", out)
    targets = [VolumeTarget(job, out / f"{job.name}.{kind or FORMATS[0]}", maps) for job in jobs]
    _check(targets, inputs, out / TABLE)
    own = OwnOutputs()
    for target in targets:
        own.check("--out", target.labels, target.files())
    own.check("--out", out / TABLE)
    return targets


def _check(targets: Sequence[VolumeTarget], inputs: Sequence[Path], *tables: Path) -> None:
    written = [file for target in targets for file in target.files()] + list(tables)
    for file in written:
        check_name("--out", file.name)
        if file.is_dir():
            raise ValueError(f"--out must have no folder of a result's name, got {file}; move it away")
    check_not_inputs("--out", written, [*inputs, *(file for target in targets for file in _files(target.job.volume))])
    check_distinct("--out", written)


def _files(volume: Path) -> list[Path]:
    """The files that a volume is read from; some formats keep voxels in a second one of the same stem."""
    if volume.is_dir():
        return [file for file in volume.rglob("*") if file.is_file()]
    first = volume.name.partition(".")[0]
    beside = (volume.parent.glob(f"{first}.*")) if volume.suffix.lower() in (".hdr", ".img", ".mhd", ".nhdr") else ()
    return [volume, *beside]


def _ending(path: Path) -> str:
    lowered = path.name.lower()
    return next((path.name[-len(e) :] for e in (*NIFTI_SUFFIXES, DICOM_SUFFIX) if lowered.endswith(e)), "")

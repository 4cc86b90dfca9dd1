"""DICOM series, written here by pydicom: voxels, order, grid and refusals; SimpleITK reads the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402
from pydicom.uid import (  # noqa: E402
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from ntpseg.volumes import is_volume, list_series, read_volume, render  # noqa: E402

CT = "1.2.840.10008.5.1.4.1.1.2"
OBLIQUE = (0.8, 0.6, 0.0, -0.36, 0.48, -0.8)


def dataset(pixels: np.ndarray, **tags) -> FileDataset:
    """A CT slice; keywords replace or (None) remove its elements."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CT
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    stored = {
        "SOPClassUID": CT,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "SeriesInstanceUID": "1.2.3",
        "SeriesNumber": 4,
        "Modality": "CT",
        "Rows": pixels.shape[-2] if pixels.shape[-1] != 3 else pixels.shape[-3],
        "Columns": pixels.shape[-1] if pixels.shape[-1] != 3 else pixels.shape[-2],
        "SamplesPerPixel": 3 if pixels.shape[-1] == 3 else 1,
        "PhotometricInterpretation": "RGB" if pixels.shape[-1] == 3 else "MONOCHROME2",
        "BitsAllocated": 8 * pixels.dtype.itemsize,
        "BitsStored": 8 * pixels.dtype.itemsize,
        "HighBit": 8 * pixels.dtype.itemsize - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "PixelSpacing": [0.5, 0.75],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "PixelData": pixels.tobytes(),
        **tags,
    }
    if pixels.shape[-1] == 3:
        stored["PlanarConfiguration"] = 0
    for name, value in stored.items():
        if value is not None:
            setattr(file, name, value)
    return file


def save(file: FileDataset, path: Path, syntax: str = ExplicitVRLittleEndian) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    file.file_meta.TransferSyntaxUID = syntax
    if syntax == ExplicitVRBigEndian:
        file.set_original_encoding(False, False)
    file.save_as(path, enforce_file_format=True)
    return path


def series(folder: Path, count: int = 5, step=(0.0, 0.0, 2.5), order=None, **tags) -> np.ndarray:
    """`count` slices of random Hounsfield units, saved under names in another order; returns them as stored."""
    stored = np.random.default_rng(0).integers(0, 3000, (count, 6, 7)).astype(np.int16)
    names = np.random.default_rng(1).permutation(count)
    for index in order if order is not None else range(count):
        position = [float(p + index * s) for p, s in zip((-100, -50, 10), step)]
        file = dataset(stored[index], ImagePositionPatient=position, RescaleSlope=1, RescaleIntercept=-1024, **tags)
        save(file, folder / f"{names[index]:03d}")
    return stored.astype(np.int32) - 1024


def with_sitk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    sitk = pytest.importorskip("SimpleITK")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image), affine


@pytest.mark.parametrize(
    ("orientation", "step"),
    [((1, 0, 0, 0, 1, 0), (0, 0, 2.5)), (OBLIQUE, (-1.2, 1.6, 1.5)), ((1, 0, 0, 0, 0, -1), (0, 3, 0))],
)
def test_series_lies_where_simpleitk_says(tmp_path, orientation, step):
    expected = series(tmp_path, ImageOrientationPatient=list(orientation), step=step)
    volume = read_volume(tmp_path)
    voxels, affine = with_sitk(tmp_path)
    assert np.allclose(volume.stored.affine, affine, atol=1e-6)
    assert (volume.to_stored(volume.voxels) == voxels).all()
    assert (voxels == expected).all()
    assert volume.header.modality == "CT" and volume.header.spacing_known and volume.header.notes == ()
    assert is_volume(tmp_path)


def test_folders_inside_and_other_files(tmp_path):
    expected = series(tmp_path / "study" / "a")
    (tmp_path / "readme.txt").write_text("no image")
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    assert (read_volume(tmp_path).voxels == expected).all()


def test_several_series_are_listed_and_chosen(tmp_path):
    series(tmp_path / "a")
    other = series(tmp_path / "b", count=3, SeriesInstanceUID="1.2.99999", SeriesNumber=7)
    with pytest.raises(ValueError, match=r"got 2; .*4: 5 slices of 7x6, CT; 7: 3 slices of 7x6, CT"):
        read_volume(tmp_path)
    assert (read_volume(tmp_path, series="7").voxels == other).all()
    assert (read_volume(tmp_path, series="99999").voxels == other).all()
    with pytest.raises(ValueError, match=r"series must be one of those in .*, got '8'; there are 4: 5"):
        read_volume(tmp_path, series="8")


def test_same_number_twice(tmp_path):
    series(tmp_path / "a")
    series(tmp_path / "b", count=3, SeriesInstanceUID="1.2.4")
    assert [info.name for info in list_series(tmp_path)] == ["4-1", "4-2"]
    assert read_volume(tmp_path, series="4-2").count() == 3


def test_scouts_are_left_out(tmp_path):
    expected = series(tmp_path / "a", count=12)
    series(
        tmp_path / "scout",
        count=1,
        SeriesInstanceUID="1.2.5",
        SeriesNumber=1,
        ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
    )
    series(tmp_path / "planned", count=2, ImageOrientationPatient=[1, 0, 0, 0, 0, -1], step=(0, 5, 0))
    volume = read_volume(tmp_path)
    assert (volume.voxels == expected).all()
    assert "2 of 14 slices have another direction" in volume.header.notes[0]


def test_missing_double_and_uneven_slices(tmp_path):
    series(tmp_path / "missing", count=6, order=[0, 1, 3, 4, 5])
    with pytest.raises(ValueError, match=r"got 5 of 6: 5 mm instead of 2.5 mm between 12.50 and 17.50 mm"):
        read_volume(tmp_path / "missing")
    expected = series(tmp_path / "double")
    file = pydicom.dcmread(tmp_path / "double" / "000")
    save(file, tmp_path / "double" / "copy")
    volume = read_volume(tmp_path / "double")
    assert (volume.voxels == expected).all() and volume.header.notes == ("1 slice is there twice and read once",)
    file.SOPInstanceUID = file.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    save(file, tmp_path / "double" / "copy")
    with pytest.raises(ValueError, match="got 6 slices at 5 places"):
        read_volume(tmp_path / "double")
    # As some anonymisers leave them.
    expected = series(tmp_path / "one", SOPInstanceUID="1.2.9")
    volume = read_volume(tmp_path / "one")
    assert (volume.voxels == expected).all() and not volume.header.notes
    series(tmp_path / "uneven", count=4)
    file = pydicom.dcmread(tmp_path / "uneven" / "000")
    file.ImagePositionPatient = [-100, -50, float(file.ImagePositionPatient[2]) + 0.6]
    save(file, tmp_path / "uneven" / "000")
    with pytest.raises(ValueError, match="evenly spaced slices, got gaps of"):
        read_volume(tmp_path / "uneven")


def test_phases_of_one_series(tmp_path):
    series(tmp_path / "a", TemporalPositionIdentifier=1, Modality="MR")
    series(tmp_path / "b", TemporalPositionIdentifier=2, Modality="MR")
    assert [(info.name, info.slices) for info in list_series(tmp_path)] == [("4-1", 5), ("4-2", 5)]
    assert read_volume(tmp_path, series="4-2").count() == 5


def test_gantry_tilt_is_kept(tmp_path):
    series(tmp_path, step=(0.0, 0.5, 2.5))
    volume = read_volume(tmp_path)
    assert volume.stored.affine[:3, 2] == pytest.approx([0, 0.5, 2.5])
    assert volume.header.notes == ("gantry tilt of 11.3 degrees: slices are shifted against each other, and stay so",)


def test_slope_of_each_slice_is_its_own(tmp_path):
    for index, slope in enumerate((0.5, 2.0)):
        pixels = np.full((4, 4), 10, np.uint16)
        place = [0.0, 0.0, float(index)]
        save(dataset(pixels, ImagePositionPatient=place, RescaleSlope=slope, RescaleIntercept=1), tmp_path / str(index))
    voxels = read_volume(tmp_path).voxels
    assert voxels.dtype == np.float32 and voxels[:, 0, 0].tolist() == [6.0, 21.0]


def test_padding_is_the_darkest_of_the_rest(tmp_path):
    pixels = np.array([[-2000, 0], [100, 500]], np.int16)
    save(dataset(pixels, PixelPaddingValue=-2000, RescaleSlope=1, RescaleIntercept=-1000), tmp_path / "a")
    assert read_volume(tmp_path / "a").voxels.tolist() == [[[-1000, -1000], [-900, -500]]]


def test_modality_table(tmp_path):
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [4, 0, 16])
    table.add_new("LUTData", "US", [5, 50, 500, 5000])
    table.ModalityLUTType = "US"
    file = dataset(np.array([[0, 1], [2, 3]], np.uint8), ModalityLUTSequence=[table])
    save(file, tmp_path / "a")
    assert read_volume(tmp_path / "a").voxels.tolist() == [[[5, 50], [500, 5000]]]


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_compressed(tmp_path, syntax):
    pixels = np.random.default_rng(0).integers(0, 4000, (64, 72)).astype(np.uint16)
    file = dataset(pixels)
    file.compress(syntax, generate_instance_uid=False)
    assert file.file_meta.TransferSyntaxUID == syntax
    file.save_as(tmp_path / "a", enforce_file_format=True)
    assert (read_volume(tmp_path / "a").voxels[0] == pixels).all()


@pytest.mark.parametrize("syntax", [DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_other_syntaxes(tmp_path, syntax):
    pixels = np.random.default_rng(0).integers(0, 4000, (6, 7)).astype(np.uint16)
    stored = pixels.byteswap() if syntax == ExplicitVRBigEndian else pixels
    save(dataset(pixels, PixelData=stored.tobytes()), tmp_path / "a", syntax)
    assert (read_volume(tmp_path / "a").voxels[0] == pixels).all()


def test_jpeg_baseline_colour_and_no_preamble(tmp_path):
    import io

    from PIL import Image
    from pydicom.encaps import encapsulate

    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, :8, 0] = 250
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95)
    file = dataset(picture, PhotometricInterpretation="YBR_FULL_422", Modality="US", PixelSpacing=None)
    file.PixelData = encapsulate([buffer.getvalue()])
    save(file, tmp_path / "a", "1.2.840.10008.1.2.4.50")
    volume = read_volume(tmp_path / "a")
    assert volume.voxels.shape == (1, 16, 16, 3) and np.abs(volume.voxels[0].astype(int) - picture).mean() < 8
    assert not volume.header.spacing_known
    plain = dataset(np.arange(6, dtype=np.uint8).reshape(3, 2))
    pydicom.dcmwrite(tmp_path / "b", Dataset(plain), implicit_vr=True, little_endian=True)
    assert read_volume(tmp_path / "b").voxels[0].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_palette(tmp_path):
    pixels = np.array([[0, 1]], np.uint8)
    file = dataset(pixels, PhotometricInterpretation="PALETTE COLOR")
    for colour, values in (("Red", [0, 0xFFFF]), ("Green", [0, 0x8000]), ("Blue", [0, 0])):
        setattr(file, f"{colour}PaletteColorLookupTableDescriptor", [2, 0, 16])
        setattr(file, f"{colour}PaletteColorLookupTableData", np.array(values, "<u2").tobytes())
    save(file, tmp_path / "a")
    assert read_volume(tmp_path / "a").voxels[0, 0].tolist() == [[0, 0, 0], [255, 128, 0]]


def test_monochrome1_is_displayed_inverted(tmp_path):
    tags = {"PhotometricInterpretation": "MONOCHROME1", "Modality": "DX", "WindowCenter": 128.5, "WindowWidth": 256}
    save(dataset(np.array([[0, 255]], np.uint16), **tags), tmp_path / "a")
    volume = read_volume(tmp_path / "a")
    assert volume.voxels.tolist() == [[[0, 255]]] and volume.header.inverted
    shown = render(volume, "auto")
    assert shown.window == "0.5..255.5" and shown.slice(0).tolist() == [[255, 0]]


def test_enhanced_multi_frame(tmp_path):
    pixels = np.arange(3 * 2 * 2, dtype=np.uint16).reshape(3, 2, 2)
    file = dataset(pixels, NumberOfFrames=3, PixelSpacing=None, ImageOrientationPatient=None)

    def items(**sequences) -> Dataset:
        group = Dataset()
        for name, tags in sequences.items():
            item = Dataset()
            for tag, value in tags.items():
                setattr(item, tag, value)
            setattr(group, name, [item])
        return group

    file.SharedFunctionalGroupsSequence = [
        items(
            PixelMeasuresSequence={"PixelSpacing": [0.5, 0.75], "SliceThickness": 9},
            PlaneOrientationSequence={"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]},
        )
    ]
    file.PerFrameFunctionalGroupsSequence = [
        items(
            PlanePositionSequence={"ImagePositionPatient": [0, 0, place]},
            PixelValueTransformationSequence={"RescaleSlope": slope, "RescaleIntercept": 0},
            FrameVOILUTSequence={"WindowCenter": 40, "WindowWidth": 400},
        )
        for place, slope in ((6, 1), (0, 10), (3, 100))
    ]
    save(file, tmp_path / "a")
    volume = read_volume(tmp_path / "a")
    assert volume.voxels[:, 0, 0].tolist() == [40, 800, 0]
    assert volume.geometry.spacing == (3.0, 0.5, 0.75) and is_volume(tmp_path / "a")
    assert volume.header.windows == ((-160.0, 239.0),)


def test_film_has_no_millimetres_along_its_frames(tmp_path):
    pixels = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)
    file = dataset(pixels, NumberOfFrames=2, Modality="US", Rows=2, Columns=3, ImageOrientationPatient=None)
    save(file, tmp_path / "a")
    volume = read_volume(tmp_path / "a")
    assert (volume.voxels == pixels).all() and not volume.header.spacing_known and is_volume(tmp_path / "a")


def test_separate_images_are_no_volume(tmp_path):
    for name in "ab":
        save(dataset(np.zeros((4, 4), np.uint8), Modality="DX", ImageOrientationPatient=None), tmp_path / name)
    assert not is_volume(tmp_path) and not is_volume(tmp_path / "a")
    with pytest.raises(ValueError, match=r"got 2 separate images \(DX\); read them one by one"):
        read_volume(tmp_path)


def test_implausible_spacing_is_unknown(tmp_path):
    series(tmp_path, PixelSpacing=[0, 0])
    volume = read_volume(tmp_path)
    assert not volume.header.spacing_known and "0 x 0 mm is not believed" in volume.header.notes[0]


def test_damaged_file_in_one_line(tmp_path):
    path = save(dataset(np.zeros((32, 32), np.uint16)), tmp_path / "a")
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(ValueError, match=r"a must have pixels that can be decoded, got Explicit") as error:
        read_volume(path)
    assert "\n" not in str(error.value)

"""Every fault of a table names its row and the cure, alike in data sets and in ``predict --texts``."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from dataset_files import picture, save, square, table
from openpyxl import Workbook, load_workbook

from ntpseg.data import check_records, load_records
from ntpseg.data.tables import read_table, write_excel
from ntpseg.generation.folder import folder_jobs
from ntpseg.utils.files import original_cell, read_csv, safe_cell, write_csv


@pytest.fixture
def pair(tmp_path: Path) -> Callable[[bytes, str], Path]:
    """Write LViT's layout with the pairs a and b and a table of this content."""

    def make(content: bytes, name: str = "Train_text.csv") -> Path:
        for stem in "ab":
            save(tmp_path / "Train_Folder" / "img" / f"{stem}.png", picture())
            save(tmp_path / "Train_Folder" / "labelcol" / f"{stem}.png", square())
        (tmp_path / "Train_Folder" / name).write_bytes(content)
        return tmp_path

    return make


HEADER = "Image,Description\n"
READ = {
    "semicolons": b"Image;Description\na.png;Two, areas.\nb.png;One.\n",
    "tabs": b"Image\tDescription\na.png\tTwo, areas.\nb.png\tOne.\n",
    "byte-order mark": b'\xef\xbb\xbfImage,Description\na.png,"Two, areas."\nb.png,One.\n',
    "utf-16": "Image\tDescription\na.png\tTwo, areas.\nb.png\tOne.\n".encode("utf-16"),
    "separator line": b"sep=;\nImage;Description\na.png;Two, areas.\nb.png;One.\n",
    "windows, blank rows": b'Image,Description\r\na.png,"Two, areas."\r\n\r\nb.png,One.\r\n,\r\n\r\n',
    "old mac": b'Image,Description\ra.png,"Two, areas."\rb.png,One.\r',
    "empty columns": b'Image,Description,,\na.png,"Two, areas.",,\nb.png,One.,,\n',
    "index column": b',Image,Description\n0,a.png,"Two, areas."\n1,b.png,One.\n',
    "names as numbers, capitals": b'Image,Description\nA.PNG,"Two, areas."\nB,One.\n',
}


@pytest.mark.parametrize("content", READ.values(), ids=READ)
def test_tables_as_people_have_them(pair: Callable, content: bytes) -> None:
    records = load_records(pair(content))
    assert [(r.case, r.text) for r in records] == [("a", "Two, areas."), ("b", "One.")]


REFUSED = {
    "more fields": (HEADER.encode() + b"a.png,T.\nb.png,Two, areas.\n", "row 3", "double quotes"),
    "fewer fields": (HEADER.encode() + b"a.png,T.\nb.png\n", "row 3", "has 1 field, the header 2"),
    "header again": (HEADER.encode() * 2 + b"a.png,T.\n", "row 2", "repeats the header; delete it"),
    "gbk": (HEADER.encode() + "a.png,左肺\n".encode("gbk"), "row 2", "save the table as UTF-8"),
    "latin-1": (HEADER.encode() + "a.png,T.\nb.png,Größe\n".encode("latin-1"), "row 3", "save the table as UTF-8"),
    "nul": (HEADER.encode() + b"a.png,T\0.\n", "row 2", "save the table as UTF-8"),
    "utf-16 without mark": ("Image,Description\na.png,T.\n".encode("utf-16-le"), "row 1", "save the table as UTF-8"),
    "open quote": (HEADER.encode() + b'a.png,"T.\nb.png,T.\n', "row 2", "quote"),
    "open quote at the end": (HEADER.encode() + b'a.png,T.\nb.png,"T.', "row 3", "quote"),
    "two open quotes": (HEADER.encode() + b'a.png,"T.\nb.png,T."\n', "row 2", "close it"),
    "text beside a quote": (HEADER.encode() + b'a.png,"left" lung\n', "row 2", "double quotes"),
    "html": (b"<!DOCTYPE html><html><table>", "", "web page"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n", "", "git lfs pull"),
    "old excel": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99), "", "save it as .xlsx"),
    "nothing": (b"", "", "empty file (0 bytes)"),
    "blanks": (b"\n\n", "", "no row"),
    "two of a column": (b"Image,Description,Description\na.png,x,y\n", "", "rename one"),
    "no header": (b"a.png,The left lung.\n", "first row", "; name its columns there"),
    "header only": (HEADER.encode(), "", "header and no row"),
}


@pytest.mark.parametrize(("content", "row", "cure"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("name", ["Train_text.csv", "Train_text.xlsx"])
def test_faults_name_row_and_cure(pair: Callable, name: str, content: bytes, row: str, cure: str) -> None:
    if name.endswith("xlsx") and b"\0" in content[:512] and not content.startswith(b"\xd0"):
        pytest.skip("a damaged workbook")
    shown = [f"{p.name} {p.detail}" for p in check_records(pair(content, name))]
    assert all(text.count(name) == 1 for text in shown if cure in text), shown
    assert any(name in text and row in text and cure in text for text in shown), shown


@pytest.mark.parametrize(("content", "row", "cure"), REFUSED.values(), ids=REFUSED)
def test_faults_are_the_same_for_predict(tmp_path: Path, content: bytes, row: str, cure: str) -> None:
    save(tmp_path / "imgs" / "a.png", picture())
    path = tmp_path / "t.csv"
    path.write_bytes(content.replace(b"Description", b"Text") if b"\0" not in content else content)
    with pytest.raises(ValueError) as refused:
        folder_jobs(tmp_path / "imgs", None, path)
    message = str(refused.value)
    assert "t.csv" in message and "\n" not in message
    if cure == "header and no row":
        assert "at least one row" in message
    elif "name its columns" in cure:
        assert "columns image and text" in message
    else:
        assert row in message and cure in message


@pytest.mark.parametrize("text", ["", "nan", "N/A", "None", "-", "NULL", "#N/A", "3.5", "2024-01-31", "TRUE", "?"])
def test_captions_that_are_no_sentences(pair: Callable, text: str) -> None:
    root = pair(f"{HEADER}a.png,{text}\nb.png,The lung.\n".encode())
    (problem,) = check_records(root)
    assert problem.kind == "image without caption" and "(row 2)" in problem.detail
    assert not text or repr(text) in problem.detail
    path = root / "t.csv"
    path.write_text(f"image,text\na.png,{text}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"row 2 of .*t\.csv: its caption is"):
        folder_jobs(root / "Train_Folder" / "img", None, path)


def book(path: Path, *rows: tuple[object, ...], merge: str = "") -> Path:
    workbook = Workbook()
    assert workbook.active is not None
    for row in rows:
        workbook.active.append(row)
    if merge:
        workbook.active.merge_cells(merge)
    workbook.save(path)
    return path


@pytest.mark.parametrize(
    ("cells", "merge", "words"),
    [
        (("T.", None), "B2:B3", "its caption is empty, merged with B2: unmerge, and repeat the text (row 3)"),
        (("T.", 4.5), "", "its caption is '4.5', not a sentence (row 3)"),
        (("T.", date(2024, 1, 31)), "", "not a sentence (row 3)"),
        (("T.", "=B2"), "", "its caption is empty, a formula without a saved value: paste it as a value (row 3)"),
    ],
)
def test_cells_of_a_workbook_that_are_no_sentences(
    pair: Callable, cells: tuple[object, object], merge: str, words: str
) -> None:
    root = pair(b"")
    (root / "Train_Folder" / "Train_text.csv").unlink()
    rows = (("Image", "Description"), ("a.png", cells[0]), ("b.png", cells[1]))
    book(root / "Train_Folder" / "Train_text.xlsx", *rows, merge=merge)
    (problem,) = check_records(root)
    assert problem.kind == "image without caption" and words in problem.detail


def rewritten(path: Path, *changes: tuple[bytes, bytes]) -> Path:
    target = path.with_name("new.xlsx")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out:
        for name in source.namelist():
            content = source.read(name)
            for old, new in changes if name == "xl/worksheets/sheet1.xml" else ():
                content = content.replace(old, new)
            out.writestr(name, content)
    return target


@pytest.mark.timeout(20)
def test_a_sheet_that_claims_a_million_rows_and_a_zip_bomb(tmp_path: Path) -> None:
    path = book(tmp_path / "t.xlsx", ("Image", "Description"), ("a.png", "T."))
    claimed = rewritten(path, (b'ref="A1:B2"', b'ref="A1:XFD1048576"'))
    assert read_table(claimed).rows == [{"image": "a.png", "description": "T."}]
    far = b'<row r="1048576"><c r="XFD1048576"><v>1</v></c></row></sheetData>'
    assert len(read_table(rewritten(path, (b"</sheetData>", far))).rows) == 1
    bomb = rewritten(path, (b"</sheetData>", b"</sheetData>" + b" " * 2**27))
    assert bomb.stat().st_size < 2**20
    with pytest.raises(ValueError, match=r"new\.xlsx must be a readable table, got .* bytes when unpacked"):
        read_table(bomb)


def test_formulas_with_a_saved_value_are_their_value(tmp_path: Path) -> None:
    path = book(tmp_path / "t.xlsx", ("Image", "Description"), ("a.png", "=A1"))
    values = [(empty, b"<v>The lung.</v>") for empty in (b"<v></v>", b"<v />", b"<v/>")]
    saved = rewritten(path, (b'<c r="B2">', b'<c r="B2" t="str">'), *values)
    assert read_table(saved).rows[0]["description"] == "The lung."


@pytest.mark.parametrize("written", ["1.0", "1", "1.png"])
@pytest.mark.parametrize("layout", ["lvit", "manifest"])
def test_names_that_a_spreadsheet_program_made_numbers(tmp_path: Path, layout: str, written: str) -> None:
    for number in (1, 10):
        save(tmp_path / "Train_Folder" / "img" / f"{number}.png", picture())
        save(tmp_path / "Train_Folder" / "labelcol" / f"{number}.png", square())
    names = [written, written.replace("1", "10", 1)]
    if layout == "lvit":
        rows = [{"Image": name, "Description": "T."} for name in names]
        table(tmp_path / "Train_Folder" / "Train_text.csv", rows)
    else:
        folders = ("Train_Folder/img", "Train_Folder/labelcol")
        rows = [
            {"image": f"{folders[0]}/{n}", "mask": f"{folders[1]}/{n}", "text": "T.", "split": "train"} for n in names
        ]
        table(tmp_path / "manifest.csv", rows)
    records = load_records(tmp_path, layout)
    assert [r.image.name for r in records] == ["1.png", "10.png"]
    assert [r.mask.name for r in records if r.mask] == ["1.png", "10.png"]


@pytest.mark.parametrize("mask", ["a_mask.png", "A.png", "a-mask.PNG", "mask_a.tif"])
def test_masks_of_other_names_belong_to_their_image(tmp_path: Path, mask: str) -> None:
    save(tmp_path / "Train_Folder" / "img" / "a.png", picture())
    save(tmp_path / "Train_Folder" / "labelcol" / mask, square())
    for name in ("a.png", mask):
        table(tmp_path / "Train_Folder" / "Train_text.csv", [{"Image": name, "Description": "T."}])
        assert check_records(tmp_path) == []
        (record,) = load_records(tmp_path)
        assert (record.case, record.mask and record.mask.name) == ("a", mask)


def test_names_that_two_files_could_mean_are_not_guessed(tmp_path: Path) -> None:
    for name in ("Ab.png", "aB.png"):
        save(tmp_path / name, picture())
    save(tmp_path / "m.png", square())
    row = {"image": "AB.png", "mask": "m.png", "text": "T.", "split": "train"}
    table(tmp_path / "manifest.csv", [row, row | {"image": "m.png"}])
    problems = check_records(tmp_path)
    assert [(p.kind, p.detail) for p in problems] == [
        ("caption without image", "there is no such image"),
        ("missing mask", "its mask is the image itself"),
    ]


@pytest.mark.parametrize("layout", ["lvit", "manifest", "texts"])
def test_files_one_folder_deeper_are_pointed_at(tmp_path: Path, layout: str) -> None:
    save(tmp_path / "Train_Folder" / "img" / "deep" / "a.png", picture())
    save(tmp_path / "Train_Folder" / "labelcol" / "deep" / "a.png", square())
    if layout == "texts":
        save(tmp_path / "Train_Folder" / "img" / "b.png", picture())
        path = table(tmp_path / "t.csv", [{"image": "a.png", "text": "T."}])
        with pytest.raises(ValueError, match=r"in row 2 of .*t\.csv; deep/a\.png has this name"):
            folder_jobs(tmp_path / "Train_Folder" / "img", None, path)
        return
    if layout == "lvit":
        table(tmp_path / "Train_Folder" / "Train_text.csv", [{"Image": "a.png", "Description": "T."}])
    else:
        row = {"image": "Train_Folder/a.png", "mask": "a.png", "text": "T.", "split": "train"}
        table(tmp_path / "manifest.csv", [row])
    (problem,) = check_records(tmp_path, layout)
    assert "img/deep/a.png has this name" in problem.detail


def test_old_excel_tables_are_named(pair: Callable) -> None:
    (problem,) = check_records(pair(b"Image,Description\na.png,T.\n", "Train_text.xls"))
    assert "Train_text.xls is not read: save it as .xlsx" in problem.detail


def test_rows_of_a_broken_table_can_be_left_out(pair: Callable) -> None:
    root = pair(HEADER.encode() + b"a.png,T.\nb.png,Two, areas.\n")
    assert [record.case for record in load_records(root, skip_bad=True)] == ["a"]


FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "=cmd|' /C calc'!A0", "'=1", " =1", "＝1"]  # noqa: RUF001


def test_formulas_in_written_tables_are_neutralised_and_read_back(tmp_path: Path) -> None:
    texts = [*FORMULAS, "The left lung.", "'quoted'", "a=b", "-0.5", "+3", "1e-3"]
    write_csv(tmp_path / "t.csv", ["text", "value"], [[text, -0.5] for text in texts])
    raw = (tmp_path / "t.csv").read_text(encoding="utf-8")
    assert all(f"'{text}" in raw for text in FORMULAS if "\r" not in text) and "-0.5\n" in raw and "\n-0.5,-0.5" in raw
    assert [row["text"] for row in read_csv(tmp_path / "t.csv")] == texts
    assert all(original_cell(safe_cell(text)) == text for text in texts)
    assert safe_cell(-1) == -1 and safe_cell(None) is None


def test_our_own_manifest_is_read_back_and_excel_cells_are_text(tmp_path: Path) -> None:
    for name in ("-a.png", "=b.png"):
        save(tmp_path / name, picture())
    save(tmp_path / "m.png", square())
    rows = [[name, "m.png", text, "train"] for name, text in (("-a.png", "-left lung"), ("=b.png", "=lung"))]
    write_csv(tmp_path / "manifest.csv", ["image", "mask", "text", "split"], rows)
    assert [(r.image.name, r.text) for r in load_records(tmp_path)] == [(row[0], row[2]) for row in rows]
    write_excel(tmp_path / "x.xlsx", ["Image", "Description"], [["a.png", "=1+1"]])
    sheet = load_workbook(tmp_path / "x.xlsx").active
    assert sheet is not None and sheet["B2"].data_type == "s" and sheet["B2"].value == "=1+1"
    assert read_table(tmp_path / "x.xlsx").rows[0]["description"] == "=1+1"

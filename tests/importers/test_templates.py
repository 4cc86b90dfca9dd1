"""Sentences from templates: fields, synonyms, unions, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ntpseg.importers.base import Structure
from ntpseg.importers.templates import Templates, fields_of, read_templates, sentence

NAMES = ("liver", "kidney_left", "kidney_right", "lung_upper_lobe_left", "lung_lower_lobe_left", "pneumothorax")
KNOWN = tuple(Structure(name, ((0, value),)) for value, name in enumerate(NAMES, start=10))


def sentences(path: Path | None, name: str, chosen: tuple[str, ...] = ()) -> tuple[str, ...]:
    return next(target.sentences for target in read_templates(path).targets(KNOWN, chosen) if target.name == name)


def written(tmp_path: Path, text: str, name: str = "t.yaml") -> Path:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kidney_left", "The left kidney."),
        ("liver", "The liver."),
        ("lung_upper_lobe_left", "The left lung upper lobe."),
        ("vertebrae_L1", "The vertebrae L1."),
        ("rib_left_1", "The left rib 1."),
        ("Left-Hippocampus", "The left hippocampus."),
        ("LeftKidney", "The left kidney."),
        ("COVID-19 infection", "The COVID-19 infection."),
        ("left_to_right_shunt", "The left to right shunt."),
    ],
)
def test_names_become_sentences(name, expected):
    assert sentence("The {name}.", fields_of(name)) == expected


def test_templates_of_fields_leave_no_gap_where_a_structure_has_no_side(tmp_path):
    path = written(tmp_path, 'templates: ["The {side} {organ}.", "segment the {side} {organ} ."]')
    assert sentences(path, "kidney_left") == ("The left kidney.", "Segment the left kidney.")
    assert sentences(path, "liver") == ("The liver.", "Segment the liver.")


def test_a_field_that_a_structure_lacks_is_one_clear_error(tmp_path):
    path = written(tmp_path, "templates: ['The {lobe} of the {organ}.']\nstructures: {liver: {lobe: left lobe}}")
    with pytest.raises(
        ValueError, match=r"t\.yaml: .*'kidney_left' has \(name, side, .* got \{lobe\} in 'The"
    ) as caught:
        read_templates(path).targets(KNOWN)
    assert "\n" not in str(caught.value)


def test_fields_synonyms_and_templates_of_a_structure(tmp_path):
    path = written(
        tmp_path,
        """
synonyms: {kidney: [renal organ]}
structures:
  kidney_left: {side: left, organ: kidney, templates: ["The {side} {organ}."]}
  liver: the liver of the patient
  14: {templates: ["Base of the left lung."]}
  pneumothorax: {templates: ["A pneumothorax."], negatives: ["No pneumothorax.", "There is no {organ}."]}
""",
    )
    assert sentences(path, "kidney_left") == ("The left kidney.", "The left renal organ.")
    assert sentences(path, "liver") == ("The liver of the patient.",)
    assert sentences(path, "lung_lower_lobe_left") == ("Base of the left lung.",)
    target = next(one for one in read_templates(path).targets(KNOWN) if one.name == "pneumothorax")
    assert target.negatives == ("No pneumothorax.", "There is no pneumothorax.")


@pytest.mark.parametrize("labels", ["[lung_*]", "[13..14]", "[13, 14]", "[lung_upper_lobe_left, '14']", "13..14"])
def test_unions(tmp_path, labels):
    path = written(tmp_path, f"structures: {{left_lung: {{labels: {labels}}}}}")
    target = read_templates(path).targets(KNOWN)[-1]
    assert target.parts == ((0, 13), (0, 14)) and target.sentences == ("The left lung.",)


def test_json_is_the_same(tmp_path):
    path = written(tmp_path, json.dumps({"templates": ["{organ}, please."]}), "t.json")
    assert sentences(path, "liver") == ("Liver, please.",)


def test_a_choice_of_structures(tmp_path):
    path = written(tmp_path, "structures: {lungs: {labels: ['lung_*']}, liver: {}}")

    def names(*chosen: str) -> list[str]:
        return [target.name for target in read_templates(path).targets(KNOWN, chosen)]

    assert names("listed") == ["liver", "lungs"]
    assert names("kidney_*", "LIVER") == ["liver", "kidney_left", "kidney_right"]
    assert len(names()) == 7
    with pytest.raises(ValueError, match=r"structures must be in the data, got 'spleen'; it has liver, kidney_left"):
        read_templates(path).check_known(KNOWN, ("spleen",))
    with pytest.raises(ValueError, match="listed"):
        Templates().check_known(KNOWN, ("listed",))


def test_sentences_of_the_source_are_kept_unless_the_file_has_its_own(tmp_path):
    known = (Structure("liver", sentences=("The brown organ.",)),)
    assert Templates().targets(known)[0].sentences == ("The brown organ.",)
    path = written(tmp_path, "structures: {liver: {templates: [Liver.]}}")
    assert read_templates(path).targets(known)[0].sentences == ("Liver.",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("template: [x]", r"keys must be among templates, negatives, synonyms, structures, got 'template'"),
        ("templates: ['The {organ']", r"templates must hold texts such as .* got 'The \{organ'"),
        ("templates: ['{organ.__class__}']", r"templates must hold fields such as \{organ\}, got"),
        ("templates: ['{}']", r"templates must hold fields"),
        ("templates: ['...']", r"templates must hold sentences"),
        ("templates: {a: b}", r"templates must be a text or a list of texts"),
        ("structures: [liver]", r"structures must map names to fields"),
        ("structures: {liver: {side: [a]}}", r"structures.liver must map fields to texts"),
        ("structures: {lungs: {labels: []}}", r"structures.lungs.labels must be names or values"),
        ("a: [", r"templates must be a readable YAML or JSON file"),
        ("- a", r"templates must be a file with a mapping"),
    ],
)
def test_a_file_that_is_wrong(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_templates(written(tmp_path, text))
    assert "t.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_that_no_structure_has(tmp_path):
    for text in ("structures: {spleen: {}}", "structures: {both: {labels: [spleen]}}"):
        with pytest.raises(ValueError, match=r"t\.yaml: .* must be in the data, got 'spleen'"):
            read_templates(written(tmp_path, text)).check_known(KNOWN, ())
    with pytest.raises(ValueError, match=r"templates must be a file, got .*, which does not exist"):
        read_templates(tmp_path / "none.yaml")

"""The structures that the CT demo segments, and the sentences that ask for them."""

from __future__ import annotations

from dataclasses import dataclass

# {the} becomes "the upper lobe of the left lung"; the first letter of a sentence is made a capital.
TEMPLATES = ("{the}.", "segment {the}.", "outline {the} in this CT slice.", "{the}, please.")


@dataclass(frozen=True, slots=True)
class Structure:
    """One target of the demo.

    Attributes:
        name: short name, used in file names.
        labels: names in the CT's `structures.csv` whose union is the target; a trailing "*" matches any ending.
        phrases: noun phrases with their article; sides are the patient's.
    """

    name: str
    labels: tuple[str, ...]
    phrases: tuple[str, ...]

    def sentences(self) -> tuple[str, ...]:
        """Every phrase in every template, the plainest ("The liver.") first."""
        sentences = (template.format(the=phrase) for template in TEMPLATES for phrase in self.phrases)
        return tuple(sentence[0].upper() + sentence[1:] for sentence in sentences)


LEFT_LUNG = ("lung_upper_lobe_left", "lung_lower_lobe_left")
RIGHT_LUNG = ("lung_upper_lobe_right", "lung_middle_lobe_right", "lung_lower_lobe_right")

STRUCTURES = (
    Structure("left-lung", LEFT_LUNG, ("the left lung", "the whole left lung")),
    Structure("right-lung", RIGHT_LUNG, ("the right lung", "the whole right lung")),
    Structure("both-lungs", LEFT_LUNG + RIGHT_LUNG, ("both lungs", "the lungs")),
    Structure("left-upper-lobe", ("lung_upper_lobe_left",), ("the upper lobe of the left lung", "the left upper lobe")),
    Structure("left-lower-lobe", ("lung_lower_lobe_left",), ("the lower lobe of the left lung", "the left lower lobe")),
    Structure(
        "right-upper-lobe", ("lung_upper_lobe_right",), ("the upper lobe of the right lung", "the right upper lobe")
    ),
    Structure(
        "right-middle-lobe", ("lung_middle_lobe_right",), ("the middle lobe of the right lung", "the right middle lobe")
    ),
    Structure(
        "right-lower-lobe", ("lung_lower_lobe_right",), ("the lower lobe of the right lung", "the right lower lobe")
    ),
    Structure("heart", ("heart", "atrial_appendage_left"), ("the heart", "the heart with its chambers")),
    Structure("aorta", ("aorta",), ("the aorta", "the main artery of the body")),
    Structure("liver", ("liver",), ("the liver", "the whole liver in this slice")),
    Structure("spleen", ("spleen",), ("the spleen", "the spleen below the left diaphragm")),
    Structure("stomach", ("stomach",), ("the stomach", "the stomach with its contents")),
    Structure("left-kidney", ("kidney_left", "kidney_cyst_left"), ("the left kidney", "the kidney on the left side")),
    Structure("right-kidney", ("kidney_right",), ("the right kidney", "the kidney on the right side")),
    Structure("vertebra", ("vertebrae_*",), ("the vertebral column", "the bones of the spine")),
    Structure("left-back-muscle", ("autochthon_left",), ("the left deep back muscles", "the left erector spinae")),
    Structure("right-back-muscle", ("autochthon_right",), ("the right deep back muscles", "the right erector spinae")),
)

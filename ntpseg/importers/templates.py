"""Sentences for structures, from templates that the user gives.

The file is YAML or JSON; every key may be left out::

    templates: ["The {side} {organ}.", "Segment the {side} {organ}."]
    negatives: ["No {organ}."]
    synonyms: {kidney: [renal organ]}
    structures:
      kidney_left: {side: left, organ: kidney}       # fields of the structure that the data set calls so
      liver: the liver                               # short for {name: the liver}
      lungs: {labels: [10..14], name: both lungs}    # a union, by names, patterns ("lung_*") or values
      pneumothorax: {templates: ["A pneumothorax."], negatives: ["No pneumothorax."]}

Without a file, and for what the file does not say, the fields come from the name: "kidney_left" has the side "left",
the organ "kidney", and the name "left kidney". A side that a structure does not have is "", and leaves no gap.
"""

from __future__ import annotations

import itertools
import json
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ntpseg.importers.base import Structure
from ntpseg.utils.checks import brief, one_line

TEMPLATES = ("The {name}.",)
NEGATIVES = ("No {name}.",)
_SIDES = ("left", "right")
_KEYS = ("templates", "negatives", "synonyms", "structures")
# Keys of a structure that are no field of it.
_RESERVED = ("labels", "templates", "negatives")
_RANGE = re.compile(r"(\d+)\s*\.\.\s*(\d+)")
# More sentences than anybody wrote come from a product of synonyms that nobody looked at.
_MOST = 1000


@dataclass(frozen=True, slots=True)
class Target:
    """A structure with its sentences.

    Attributes:
        name: of the structure.
        parts: see `Structure`.
        sentences: the plainest first.
        negatives: sentences for images without it.
        own: the sentences are the source's, and all are kept.
    """

    name: str
    parts: tuple[tuple[int, int], ...]
    sentences: tuple[str, ...]
    negatives: tuple[str, ...]
    own: bool = False


@dataclass(frozen=True, slots=True)
class Templates:
    """The content of a file of templates; without arguments what is used without a file."""

    path: Path | None = None
    templates: tuple[str, ...] = TEMPLATES
    negatives: tuple[str, ...] = NEGATIVES
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    structures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def targets(self, known: Sequence[Structure], chosen: Sequence[str] = ()) -> tuple[Target, ...]:
        """Structures of a data set with their sentences: its own, and the unions of the file.

        Args:
            known: the data set's.
            chosen: names or patterns; ("listed",): those of the file; (): all.

        Raises:
            ValueError: a template has a field that a structure lacks, or a union the name of a structure.
        """
        by_name = {structure.name: structure for structure in known}
        entries = {_find(name, known): entry for name, entry in self.structures.items() if "labels" not in entry}
        entries.pop(None, None)
        targets = [self._target(structure, entries.get(structure.name, {})) for structure in known]
        for name, entry in self.structures.items():
            if "labels" not in entry:
                continue
            if name in by_name:
                raise ValueError(self._wrong(f"a union must have a name of its own, got {name!r}, which the data have"))
            members = [_members(wanted, known) for wanted in entry["labels"]]
            if any(members):
                parts = dict.fromkeys(part for structures in members for one in structures for part in one.parts)
                targets.append(self._target(Structure(name, tuple(parts)), entry))
        return tuple(target for target in targets if self._is_chosen(target.name, chosen, entries))

    def check_known(self, known: Sequence[Structure], chosen: Sequence[str]) -> None:
        """Raise a `ValueError` if a name of the file, or a chosen one, means none of all structures of a data set."""
        unions = [name for name, entry in self.structures.items() if "labels" in entry]
        names = [structure.name for structure in known]
        for name, entry in self.structures.items():
            if "labels" not in entry and _find(name, known) is None:
                raise ValueError(self._wrong(f"structures must be in the data, got {name!r}; it has {_listed(names)}"))
            for wanted in entry.get("labels", ()):
                if not _members(wanted, known):
                    raise ValueError(
                        self._wrong(f"labels of {name!r} must be in the data, got {wanted!r}; it has {_listed(names)}")
                    )
        if tuple(chosen) == ("listed",):
            if not self.structures:
                raise ValueError("structures 'listed' must go with a file of templates that lists some, got none")
            return
        for pattern in chosen:
            if not any(_matches(name, pattern) for name in (*names, *unions)):
                raise ValueError(f"structures must be in the data, got {pattern!r}; it has {_listed(names + unions)}")

    def _is_chosen(self, name: str, chosen: Sequence[str], entries: Mapping[str | None, Any]) -> bool:
        if tuple(chosen) == ("listed",):
            return name in entries or name in self.structures
        return not chosen or any(_matches(name, pattern) for pattern in chosen)

    def _target(self, structure: Structure, entry: Mapping[str, Any]) -> Target:
        fields = fields_of(structure.name) | dict(structure.fields)
        given = {key: str(value) for key, value in entry.items() if key not in _RESERVED}
        if "name" not in given and given.keys() & {"side", "organ"}:
            given["name"] = " ".join(filter(None, ({**fields, **given}[key] for key in ("side", "organ"))))
        fields |= given
        own = bool(structure.sentences) and not entry
        sentences = structure.sentences if own else self._fill(entry.get("templates", self.templates), fields)
        negatives = structure.negatives or self._fill(entry.get("negatives", self.negatives), fields)
        return Target(structure.name, structure.parts, sentences, negatives, own)

    def _fill(self, templates: Sequence[str], fields: Mapping[str, str]) -> tuple[str, ...]:
        sentences: dict[str, None] = {}
        for template in templates:
            used = list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name is not None))
            if missing := next((name for name in used if name not in fields), None):
                raise ValueError(
                    self._wrong(
                        f"a template must use fields that structure {fields['structure']!r} has "
                        f"({', '.join(fields)}), got {{{missing}}} in {template!r}; give the structure a {missing}, or "
                        "templates of its own"
                    )
                )
            words = [(fields[name], *self.synonyms.get(fields[name], ())) for name in used]
            for choice in itertools.islice(itertools.product(*words), _MOST):
                sentences[sentence(template, dict(zip(used, choice)))] = None
        return tuple(sentences)

    def _wrong(self, message: str) -> str:
        return f"{self.path}: {message}" if self.path else message


def read_templates(path: Path | None) -> Templates:
    """Read a file of templates; None: the templates that are used without one.

    Raises:
        ValueError: it cannot be read, or is not as this module's text says; the message names the file and the key.
    """
    if path is None:
        return Templates()
    content = read_mapping(path, "templates")
    if unknown := next((key for key in content if key not in _KEYS), None):
        raise ValueError(f"{path}: keys must be among {', '.join(_KEYS)}, got {brief(unknown)}")
    structures = content.get("structures") or {}
    if not isinstance(structures, dict):
        raise ValueError(f"{path}: structures must map names to fields, got {brief(structures)}")
    synonyms = content.get("synonyms") or {}
    if not isinstance(synonyms, dict):
        raise ValueError(f"{path}: synonyms must map a word to others, got {brief(synonyms)}")
    return Templates(
        path,
        _texts(path, "templates", content.get("templates")) or TEMPLATES,
        _texts(path, "negatives", content.get("negatives")) or NEGATIVES,
        {str(word): _words(path, f"synonyms of {word}", others) for word, others in synonyms.items()},
        {str(name): _entry(path, str(name), entry) for name, entry in structures.items()},
    )


def read_mapping(path: Path, option: str) -> dict[Any, Any]:
    """The mapping that a JSON or YAML file holds; ValueError naming `option` and the file otherwise."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            content = json.loads(text, object_pairs_hook=_without_repeats)
        else:
            from omegaconf import OmegaConf

            content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except FileNotFoundError as error:
        raise ValueError(f"{option} must be a file, got {path}, which does not exist") from error
    except Exception as error:  # YAML, JSON, encoding: each library has errors of its own
        raise ValueError(f"{option} must be a readable YAML or JSON file, got {path}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{option} must be a file with a mapping, got {path} with a {type(content).__name__}")
    return content


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file; of a key that is there twice the parser keeps the last without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is in one object twice")
    return content


def fields_of(name: str) -> dict[str, str]:
    """What a structure's name tells: "kidney_left" has side "left", organ "kidney" and name "left kidney"."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name.strip())
    # "Left-Hippocampus", but "COVID-19".
    spaced = re.sub(r"(?i)\b(left|right)-|-(left|right)\b", r" \1\2 ", spaced)
    words = [word for word in re.split(r"[_\s]+", spaced) if word]
    sides = [word.lower() for word in words if word.lower() in _SIDES]
    side = sides[0] if len(sides) == 1 else ""
    organ = " ".join(word for word in words if not side or word.lower() != side)
    # Words in capitals are names: L1, CT, COVID.
    organ = " ".join(word.lower() if word.istitle() and len(word) > 2 else word for word in organ.split())
    return {"name": " ".join(filter(None, (side, organ))), "side": side, "organ": organ, "structure": name}


def sentence(template: str, fields: Mapping[str, str]) -> str:
    """A template with its fields filled in, single spaces and a capital in front."""
    text = "".join(
        literal + (fields[name] if name is not None else "")
        for literal, name, _, _ in string.Formatter().parse(template)
    )
    text = re.sub(r"\s+([.,;:!?])", r"\1", " ".join(text.split()))
    return text[:1].upper() + text[1:]


def _entry(path: Path, name: str, entry: Any) -> dict[str, Any]:
    if entry is None:
        return {}
    if isinstance(entry, str):
        # "the liver": the article is the template's.
        return {"name": re.sub(r"^[Tt]he ", "", entry.strip())}
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: structures.{name} must be a text or map fields to texts, got {brief(entry)}")
    result: dict[str, Any] = {}
    for key, value in entry.items():
        if key in ("templates", "negatives"):
            result[key] = _texts(path, f"structures.{name}.{key}", value)
        elif key == "labels":
            values = value if isinstance(value, list) else [value]
            if not values or not all(isinstance(item, str | int) and not isinstance(item, bool) for item in values):
                raise ValueError(f"{path}: structures.{name}.labels must be names or values, got {brief(value)}")
            result[key] = values
        elif not isinstance(key, str) or not key.isidentifier() or not isinstance(value, str | int | float):
            raise ValueError(f"{path}: structures.{name} must map fields to texts, got {brief(key)}: {brief(value)}")
        else:
            result[key] = str(value)
    return result


def _texts(path: Path, key: str, value: Any) -> tuple[str, ...]:
    texts = _words(path, key, value)
    for text in texts:
        try:
            parsed = list(string.Formatter().parse(text))
        except ValueError as error:
            raise ValueError(
                f"{path}: {key} must hold texts such as 'The {{organ}}.', got {text!r}: {error}"
            ) from error
        for _, name, spec, conversion in parsed:
            if name is not None and (not name.isidentifier() or spec or conversion):
                raise ValueError(f"{path}: {key} must hold fields such as {{organ}}, got {text!r}")
        if not any(letter.isalpha() for letter in text):
            raise ValueError(f"{path}: {key} must hold sentences, got {text!r}")
    return texts


def _words(path: Path, key: str, value: Any) -> tuple[str, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in values):
        raise ValueError(f"{path}: {key} must be a text or a list of texts, got {brief(value)}")
    return tuple(values)


def _find(name: str, known: Sequence[Structure]) -> str | None:
    """The structure that a name or a label's value means."""
    for structure in known:
        if structure.name == name:
            return structure.name
    if name.isdecimal():
        return next((s.name for s in known if any(value == int(name) for _, value in s.parts)), None)
    folded = [s.name for s in known if s.name.casefold() == name.casefold()]
    return folded[0] if len(folded) == 1 else None


def _members(wanted: str | int, known: Sequence[Structure]) -> list[Structure]:
    """The structures that a name, a pattern, a value or a range of values means; [] for none."""
    text = str(wanted).strip()
    if match := _RANGE.fullmatch(text):
        low, high = int(match[1]), int(match[2])
        inside = [(one, tuple(part for part in one.parts if low <= part[1] <= high)) for one in known]
        return [replace(one, parts=parts) for one, parts in inside if parts]
    name = _find(text, known)
    return [one for one in known if (one.name == name if name is not None else _matches(one.name, text))]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name.casefold(), pattern.casefold())


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:8]) + (f", ... ({len(names)} in all)" if len(names) > 8 else "")

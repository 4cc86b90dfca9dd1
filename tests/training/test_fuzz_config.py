"""Configurations that nobody would write: all of them end in one line, or load and can be saved and read again.

See `fuzz_settings` for how many of each kind are drawn.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml
from fuzz_settings import fuzz_settings
from hypothesis import example, given
from hypothesis import strategies as st

from ntpseg.training.config import dump_config, load_config

SECTIONS: dict[str, list[str]] = {
    "data": ["path", "layout", "size", "channels", "augment", "variants", "mask_noise", "skip_bad", "cache"],
    "text": ["path", "vocab_size"],
    "vision": ["path", "factor", "image_codes", "mask_codes", "dim", "steps", "learning_rate", "seed"],
    "model": ["preset", "k", "attention", "front_end", "stem", "mask_inputs", "prefix_lm", "overrides", "weights"],
    "loss": ["negatives", "tcl_weight", "hard_tokens", "temperature", "head_weights", "dice", "pixel", "soft"],
    "optimizer": ["name", "muon_learning_rate", "muon_momentum", "ema"],
    "training": ["learning_rate", "bf16", "max_steps", "report_to", "optim", "eval_strategy", "warmup_steps", "zzz"],
}
TOP = ["output", "seed", "layout", "max_minutes", "clock", "deepspeed", *SECTIONS]
KEYS = [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys] + TOP
DEEP = ["data.augment.flip", "model.stem.widths", "model.overrides.hidden_size", "model.mask_inputs.draft"]

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-(10**40), 10**40),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["nan", "1e999", "-1", "0x10", "???", "${seed}", "${data.path}", "${x}", "${oc.env:HOME}", "${", "~"]
    ),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
words = st.sampled_from(
    [*"{}[]:,=.&*!|>-#%@`'\"\t\n ", "a", "1", "null", "model", "k", "data", "${", "}", "? ", "<<", "---"]
)


def refused_or_loaded(source: Path | str, overrides: list[str]) -> None:
    """A configuration that loads can be saved and gives itself again; any other is refused on one line."""
    try:
        config = load_config(source, overrides)
    except ValueError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 3000, message
        return
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder, "config.yaml")
        saved.write_text(dump_config(config), encoding="utf-8")
        assert dump_config(load_config(saved)) == dump_config(config)


def from_file(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "c.yaml")
        path.write_bytes(content)
        refused_or_loaded(path, [])


@fuzz_settings(50)
@given(st.lists(st.tuples(st.sampled_from([*KEYS, *DEEP]), values), min_size=1, max_size=3))
def test_a_value_of_any_kind_at_any_key(pairs: list[tuple[str, Any]]) -> None:
    content: dict[str, Any] = {}
    for key, value in pairs:
        *sections, last = key.split(".")
        at = content
        for section in sections:
            inner = at.setdefault(section, {})
            if not isinstance(inner, dict):
                inner = at[section] = {}
            at = inner
        at[last] = value
    from_file(yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass"))


@fuzz_settings(50)
@given(st.binary(max_size=60) | st.lists(words, max_size=30).map(lambda parts: "".join(parts).encode()))
@example(b"")
@example(b"\xff\xfe\x00")
@example(b"[" * 5000)
@example(b"a: &a [x, x]\nb: &b [*a, *a]\n")
@example(b"a: &a [*a]\n")
@example(b"? [a, b]\n: 1\n")
def test_files_that_are_no_configuration(content: bytes) -> None:
    from_file(content)


@fuzz_settings(50)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=20),
            st.lists(words, max_size=12).map("".join),
            st.tuples(st.sampled_from([*KEYS, *DEEP]), st.text(max_size=12)).map("=".join),
            st.tuples(st.sampled_from([*KEYS, *DEEP]), scalars.map(str)).map("=".join),
        ),
        max_size=3,
    )
)
@example(["a..b=1"])
@example(["model.stem.widths[1000000000]=1"])
@example(["training.learning_rate=" + "9" * 5000])
def test_overrides_of_any_form(overrides: list[str]) -> None:
    refused_or_loaded("tiny", overrides)

"""What `reproduce` trains: each cell is one model with one seed, one budget and the settings that it differs in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# Sizes of the model by core-minutes: a larger one learns more from a longer run (chosen on validation).
SIZES: tuple[tuple[float, dict[str, str]], ...] = (
    (8, {"model.stem.widths": "[32,64,128,128]", "model.overrides.num_hidden_layers": "1"}),
    (25, {"model.stem.widths": "[48,96,192,192]", "model.overrides.num_hidden_layers": "2"}),
    (1e9, {"model.stem.widths": "[64,128,256,256]", "model.overrides.num_hidden_layers": "3"}),
)
_LARGE = SIZES[-2][0]
NO_CAPTION = {"model.stem.caption_dim": "0"}
GROUPS = ("main", "decoding", "ablation", "sweep", "low-data")


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        group: table that it belongs to, one of `GROUPS`.
        label: its row there.
        model: "ntpseg", "decode" (the main table's model of these minutes and this seed, decoded in another way), a
            network of `benchmarks.accuracy.baseline`, or "text-prior".
        minutes: core-minutes of training.
        seed: of everything random.
        settings: overrides of ``qata.yaml``, or options of ``ntpseg eval`` or of the baseline.
        final: the test split is scored, once.
        fraction: share of the training split that is used.
    """

    group: str
    label: str
    model: str
    minutes: float
    seed: int = 0
    settings: dict[str, str] = field(default_factory=dict)
    final: bool = False
    fraction: float = 1.0

    @property
    def name(self) -> str:
        """Name of its files."""
        words = "".join(c if c.isalnum() else "-" for c in self.label.lower())
        return f"{self.group}_{'-'.join(filter(None, words.split('-')))}_{self.minutes:g}min_seed{self.seed}"


def ntpseg(group: str, label: str, minutes: float, seed: int = 0, **options: Any) -> Cell:
    """A cell of this package's model, at the size for its minutes."""
    size = next(size for most, size in SIZES if minutes <= most)
    return Cell(group, label, "ntpseg", minutes, seed, {**size, **options.pop("settings", {})}, **options)


_STRATEGIES = {
    "NkTP": {"model.k": "2"},
    "TCL": {"loss.negatives": "5", "loss.tcl_weight": "0.1"},
    "HET": {"loss.hard_tokens": "16", "loss.het_weight": "0.1"},
}
# What differs from the recipe in each row; the first group removes, the second adds.
ABLATION: dict[str, dict[str, str]] = {
    "the recipe": {},
    "image as codes (the paper's)": {
        "model.front_end": "codes",
        "loss.pixel": "0.0",
        "vision.image_codes": "1024",
        "data.variants": "3",
    },
    "features not aligned": {"model.stem.aligned": "false"},
    "no caption conditioning": NO_CAPTION,
    "features and codes": {"model.front_end": "both", "vision.image_codes": "1024"},
    "true tokens as inputs": {"model.mask_inputs": "null"},
    "no draft as inputs": {"model.mask_inputs.draft": "0.0"},
    "only blanks as inputs": {"model.mask_inputs.blank": "1.0"},
    "no Dice on expected patches": {"loss.dice": "0.0"},
    "no pixel head": {"loss.pixel": "0.0"},
    "no average of the weights": {"optimizer.ema": "0.0"},
    "AdamW alone": {"optimizer.name": "adamw"},
    "+ bidirectional prompt": {"model.prefix_lm": "true"},
    "+ drafts of its own second pass": {"model.mask_inputs.second_pass": "1.0"},
    "+ soft targets": {"loss.soft": "0.5"},
    **{f"+ {name}": settings for name, settings in _STRATEGIES.items()},
    "+ NkTP + TCL + HET": {k: v for settings in _STRATEGIES.values() for k, v in settings.items()},
}
# Sampling is slow, so these are scored on some validation cases.
DECODE_CASES = 400
_THRESHOLD = {"threshold": "0.5"}  # the model's own was chosen for its own method
_PLAIN = {"method": "refine", "no-mirror": ""} | _THRESHOLD
ONE_PASS = "one pass, then 0 refinements"
DECODING: dict[str, dict[str, str]] = {
    **{f"one pass, then {r} refinements": {**_PLAIN, "passes": str(r)} for r in (0, 1, 2, 4)},
    "one pass and its mirror image": {"method": "refine", "passes": "0", "mirror": ""} | _THRESHOLD,
    "token by token, nearest to the expected patch": {"method": "expected"} | _THRESHOLD,
    "mean of 8 samples": {"method": "sample", "samples": "8"} | _THRESHOLD,
    "token by token, likeliest (the paper's)": {"method": "greedy"} | _THRESHOLD,
}
BASELINES: dict[str, tuple[str, dict[str, str]]] = {
    "U-Net, image alone": ("unet", {}),
    "text U-Net": ("text-unet", {"dice": "batch", "ema": "0"}),
    "text U-Net, Dice per image": ("text-unet", {"ema": "0"}),
    "text U-Net, Dice per image, EMA": ("text-unet", {}),
    "text U-Net, Dice per image, EMA, Muon": ("text-unet", {"optimizer": "muon"}),
    "U-Net with attention to words, Muon": ("word-attention", {"optimizer": "muon"}),
    "DynUNet, image alone, Muon": ("dynunet", {"optimizer": "muon"}),
}
FRACTIONS = (0.01, 0.05, 0.25, 1.0)


def qata_cells(minutes: Sequence[float], seeds: int, groups: Sequence[str] = GROUPS) -> list[Cell]:
    """All cells, the ones of the main table first and seed by seed, so that a stopped study is a smaller study."""
    cells: list[Cell] = []
    for seed in range(seeds):
        for budget in minutes:
            if "main" in groups:
                # Of the largest size, the better one on validation; an ablation of it is of the recipe all the same.
                settings = NO_CAPTION if budget > _LARGE else {}
                cells.append(ntpseg("main", "ntpseg", budget, seed, settings=settings, final=True))
                for label, (network, settings) in BASELINES.items():
                    cells.append(Cell("main", label, network, budget, seed, settings, final=True))
    if "main" in groups:
        cells.append(Cell("main", "text prior", "text-prior", 0.0, final=True))
    short = min(minutes)
    for seed in range(seeds):
        if "decoding" in groups:
            cells += [Cell("decoding", label, "decode", short, seed, options) for label, options in DECODING.items()]
        if "ablation" in groups:
            for label, settings in ABLATION.items():
                cells.append(ntpseg("ablation", label, short, seed, settings=settings))
        if "sweep" in groups:
            # k = 1, m = 0 and n = 0 are the recipe itself.
            for k in (1, 2, 4):
                settings = {"model.k": str(k)} if k > 1 else {}
                cells.append(ntpseg("sweep", f"k = {k}", short, seed, settings=settings))
            for m in (0, 1, 5, 20):
                settings = {"loss.negatives": str(m), "loss.tcl_weight": "0.1"} if m else {}
                cells.append(ntpseg("sweep", f"m = {m}", short, seed, settings=settings))
            for n in (0, 8, 16, 64):
                settings = {"loss.hard_tokens": str(n), "loss.het_weight": "0.1"} if n else {}
                cells.append(ntpseg("sweep", f"n = {n}", short, seed, settings=settings))
        if "low-data" in groups:
            for fraction in FRACTIONS:
                label = f"{100 * fraction:g} % of the training pairs"
                ours = ntpseg("low-data", f"ntpseg, {label}", short, seed)
                network, settings = BASELINES["text U-Net, Dice per image, EMA, Muon"]
                cells.append(replace(ours, fraction=fraction))
                cells.append(
                    Cell("low-data", f"text U-Net, {label}", network, short, seed, settings, fraction=fraction)
                )
    return cells

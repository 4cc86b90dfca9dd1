"""Options that several commands share; the names that they list come from the registries."""

from __future__ import annotations

from typing import Annotated

import typer

from ntpseg.data.layouts import LAYOUT_NAMES
from ntpseg.generation.methods import METHODS


def choices(names: tuple[str, ...]) -> str:
    """``a, b or c.``, for help texts."""
    return f"{', '.join(names[:-1])} or {names[-1]}."


Layout = Annotated[str, typer.Option(help=choices(LAYOUT_NAMES))]
MaskValue = Annotated[
    str, typer.Option(help="Class of label maps whose table names none: a number, or a colour such as #ff0000.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU if there is one.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad pairs out, and list them.")]
BatchSize = Annotated[int, typer.Option(help="Images decoded together.")]
# Without these the model decodes as validation chose when it was trained.
Method = Annotated[str | None, typer.Option(help=f"{choices(tuple(METHODS))} By default the model's own.")]
Passes = Annotated[int | None, typer.Option(help="refine: how often the draft of the mask is read.", min=0)]
Samples = Annotated[int | None, typer.Option(help="sample: masks that are averaged.", min=1)]
Temperature = Annotated[
    float | None, typer.Option(help="sample: of the distribution over codes; below 1 the likely becomes likelier.")
]
TopP = Annotated[float | None, typer.Option(help="sample: draw from the likeliest codes that together reach this.")]
Seed = Annotated[int | None, typer.Option(help="sample: of the random numbers.", min=0)]
Threshold = Annotated[
    float | None, typer.Option(help="Probability, before its calibration, from which a pixel is foreground.")
]
Mirror = Annotated[
    bool | None,
    typer.Option(
        "--mirror/--no-mirror", help="Average with the mirrored image, left and right exchanged in the sentence."
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]

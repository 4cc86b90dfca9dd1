"""The ``ntpseg tokenizer`` commands: train tokenizers, encode a data set, report what the codes lose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ntpseg.commands.options import Device, Layout, SkipBad

if TYPE_CHECKING:
    import torch

    from ntpseg.data import Record
    from ntpseg.tokenizers.vision import VisionTokenizer

tokenizer = typer.Typer(
    name="tokenizer", help="Train tokenizers, encode data sets, report reconstructions.", no_args_is_help=True
)

Data = Annotated[Path, typer.Argument(help="Folder of the data set, or a manifest file.", show_default=False)]
Tokenizers = Annotated[
    Path,
    typer.Option(help="What `tokenizer train` wrote, a trained model, or an Emu3VQVAE directory.", show_default=False),
]
Split = Annotated[str, typer.Option(help="train, val or test.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Variants = Annotated[int, typer.Option(help="Augmented copies of each pair, besides the original.", min=0)]
Flip = Annotated[float, typer.Option(help="Probability of a horizontal flip of a copy.", min=0, max=1)]
Size = Annotated[int | None, typer.Option(help="Side of the input in pixels; needed for a plain Emu3VQVAE directory.")]
Text = Annotated[Path | None, typer.Option(help="Text tokenizer directory; by default the one beside the vision's.")]


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.add_typer(tokenizer)


@tokenizer.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Argument(help="Directory to write: vision/ and text/.", show_default=False)],
    size: Annotated[int, typer.Option(help="Side of the square input in pixels.", min=4)] = 112,
    channels: Annotated[int, typer.Option(help="1 (grey) or 3 (RGB).")] = 1,
    factor: Annotated[int, typer.Option(help="Pixels per code along each side: 4, 8 or 16.")] = 8,
    image_codes: Annotated[int, typer.Option(help="Size of the image codebook.")] = 512,
    mask_codes: Annotated[int, typer.Option(help="Size of the mask codebook.")] = 256,
    steps: Annotated[int, typer.Option(help="Decoder training steps of each branch; 0: k-means alone.")] = 300,
    text_vocab_size: Annotated[int, typer.Option(help="Most ids of the text tokenizer.")] = 512,
    variants: Variants = 0,
    flip: Flip = 0.0,
    layout: Layout = "auto",
    skip_bad: SkipBad = False,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Train the compact vision tokenizer and the text tokenizer on the training split."""
    from ntpseg.data import Augmentation
    from ntpseg.tokenizers.compact import CompactVQOptions
    from ntpseg.tokenizers.compact_training import train_compact_vq
    from ntpseg.tokenizers.preprocess import stack_pairs
    from ntpseg.tokenizers.text import train_text_tokenizer
    from ntpseg.utils.checks import check_multiple

    _check_out(out, data)
    options = CompactVQOptions(factor=factor, image_codes=image_codes, mask_codes=mask_codes, steps=steps, seed=seed)
    check_multiple("size", size, "factor", factor)
    records = _records(data, layout, skip_bad, "train")
    text = train_text_tokenizer([r.text for r in records], text_vocab_size)
    images, masks = stack_pairs(
        records,
        size,
        channels,
        limit=max(1, options.max_images // (1 + variants)),
        variants=variants,
        augmentation=Augmentation(flip=flip) if variants else None,
        seed=seed,
    )
    target = _device(device)
    vision = train_compact_vq(images.to(target), masks.to(target), options)
    vision.save_pretrained(out / "vision")
    text.save_pretrained(str(out / "text"))
    typer.echo(f"vision tokenizer: {out / 'vision'}\ntext tokenizer, {len(text)} ids: {out / 'text'}")


@tokenizer.command()
def encode(
    data: Data,
    out: Annotated[Path, typer.Argument(help="Directory of token caches.", show_default=False)],
    tokenizers: Tokenizers,
    text: Text = None,
    split: Split = "train",
    variants: Variants = 0,
    flip: Flip = 0.0,
    size: Size = None,
    layout: Layout = "auto",
    skip_bad: SkipBad = False,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Tokenise a split once into a memory-mapped cache; does nothing where that cache exists."""
    from ntpseg.data import Augmentation
    from ntpseg.tokenizers.cache import TokenCache
    from ntpseg.tokenizers.text import load_text_tokenizer

    _check_out(out, data, tokenizers)
    vision, folder = _vision(tokenizers, size, device)
    cache = TokenCache.build(
        out,
        _records(data, layout, skip_bad, split),
        vision,
        load_text_tokenizer(text or folder.parent / "text"),
        variants=variants,
        augmentation=Augmentation(flip=flip) if variants else None,
        seed=seed,
    )
    typer.echo(f"{len(cache)} pairs, {1 + cache.variants} each: {cache.directory / cache.key}")


@tokenizer.command()
def report(
    data: Data,
    tokenizers: Tokenizers,
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("tokenizer-report.html"),
    split: Split = "test",
    examples: Annotated[int, typer.Option(help="Examples to show.", min=1)] = 12,
    limit: Annotated[int | None, typer.Option(help="At most this many pairs, drawn at random.", min=1)] = None,
    size: Size = None,
    layout: Layout = "auto",
    skip_bad: SkipBad = False,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Encode and decode a split: originals beside reconstructions, mask Dice ceiling, image PSNR."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from ntpseg.tokenizers.quality import measure
    from ntpseg.tokenizers.report import write_report
    from ntpseg.utils.outputs import check_file, check_not_inputs

    check_file("--out", out, (".html", ".htm"))
    check_not_inputs("--out", [out], [data, *(path for path in tokenizers.rglob("*") if path.is_file())])
    vision, _ = _vision(tokenizers, size, device)
    records = _records(data, layout, skip_bad, split)
    if limit is not None and len(records) > limit:
        chosen = np.random.default_rng(seed).permutation(len(records))[:limit]
        records = [records[i] for i in sorted(chosen)]
    quality = measure(vision, records, examples=examples)
    write_report(out, vision, quality, f"Tokenizer on {data.name}, {split} split")
    summary = quality.summary()
    table = Table("measure", "value", title=f"{type(vision).__name__}, {split} split, {summary['cases']} pairs")
    table.add_row("mask Dice ceiling, per-image mean, own size", f"{summary['dice_ceiling']:.4f}")
    table.add_row("mask Dice ceiling, pooled, own size", f"{summary['dice_ceiling_pooled']:.4f}")
    at_size = summary["dice_ceiling_at_tokenizer_size"]
    table.add_row(f"mask Dice ceiling, per-image mean, {vision.image_size} px", f"{at_size:.4f}")
    table.add_row(f"image PSNR, {vision.image_size} px", f"{summary['image_psnr_db']:.2f} dB")
    table.add_row("image codes used", f"{summary['image_codes_used']} of {vision.image_codes}")
    table.add_row("mask codes used", f"{summary['mask_codes_used']} of {vision.mask_codes}")
    Console().print(table)
    typer.echo(f"report: {out}")


def _check_out(out: Path, *inputs: Path) -> None:
    from ntpseg.utils.outputs import check_folder, same_place

    check_folder("OUT", out)
    for path in inputs:
        if same_place(out, path):
            raise ValueError(f"OUT must not be what is read, got {out}; choose another folder")


def _records(data: Path, layout: str, skip_bad: bool, split: str) -> list[Record]:
    """Pairs of one split; what was left out is listed."""
    from rich.console import Console

    from ntpseg.data import problem_table, usable_records

    records, problems = usable_records(data, layout, skip_bad=skip_bad)
    if problems:
        Console(stderr=True).print(problem_table(problems, title="Left out"))
    splits = sorted({r.split for r in records})
    records = [r for r in records if r.split == split]
    if not records:
        raise ValueError(f"split must be one of {', '.join(splits)}, the splits of the data, got {split!r}")
    return records


def _vision(directory: Path, size: int | None, device: str | None) -> tuple[VisionTokenizer, Path]:
    """The vision tokenizer in `directory`, its vision/ or its model/vision/; and where that is."""
    from ntpseg.tokenizers.auto import load_vision_tokenizer

    for candidate in (directory / "model" / "vision", directory / "vision", directory):
        if (candidate / "config.json").is_file():
            vision = load_vision_tokenizer(candidate, image_size=size)
            vision.to(_device(device))
            return vision, candidate
    raise ValueError(
        f"--tokenizers must hold a vision tokenizer, in vision/, model/vision/ or itself, got {str(directory)!r}"
    )


def _device(name: str | None) -> torch.device:
    from ntpseg.utils.device import usable_device

    return usable_device(name)

"""``ntpseg data pack``: a data set as shards that training streams."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ntpseg.commands.options import Layout, MaskValue, SkipBad

_UNITS = {"": 1, "b": 1, "kb": 2**10, "mb": 2**20, "gb": 2**30}


def pack(
    folder: Annotated[Path, typer.Argument(help="Folder of the data set, or a manifest file.", show_default=False)],
    out: Annotated[
        Path, typer.Argument(help="Folder to make, or an fsspec URL such as s3://bucket/set.", show_default=False)
    ],
    format: Annotated[str, typer.Option(help="parquet or webdataset (tar).")] = "parquet",
    shard_size: Annotated[str, typer.Option(help="Close a shard at so many bytes, such as 64MB.")] = "256MB",
    tokenizers: Annotated[
        Path | None, typer.Option(help="Write tokens too: of a run, or of a folder with text/ and vision/.")
    ] = None,
    layout: Layout = "auto",
    mask_value: MaskValue = "",
    keep_empty: Annotated[bool, typer.Option("--keep-empty", help="Pack cases without a finding too.")] = False,
    skip_bad: SkipBad = False,
) -> None:
    """Check a data set and write it as shards that training streams, from a disk or over a network."""
    from ntpseg.data import MaskOptions
    from ntpseg.data.shards.writing import PackOptions, pack_dataset
    from ntpseg.utils.progress import stage_progress

    options = PackOptions(format, _bytes(shard_size), layout, MaskOptions(keep_empty, mask_value), skip_bad)
    tokenizer = None
    if tokenizers is not None:
        from ntpseg.tokenizers.pack_tokens import PackTokenizer

        tokenizer = PackTokenizer.load(tokenizers)
    with stage_progress() as progress:
        done = pack_dataset(folder, out, options, tokenizer=tokenizer, progress=progress)
    for line in done.left_out:
        typer.secho(f"left out: {line}", fg="yellow", err=True)
    for name, split in done.manifest.splits.items():
        size = sum(shard.bytes for shard in split.shards)
        shards = f"{len(split.shards)} shard{'s' * (len(split.shards) != 1)}"
        typer.echo(f"{name}: {split.samples} pairs in {shards}, {size / 2**20:.1f} MiB")
    typer.echo(f"written to {out}; train on it with data.path={out}")


def _bytes(text: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]?b?)\s*", text.lower())
    size = 0 if found is None else int(float(found[1]) * _UNITS[f"{found[2].removesuffix('b')}b" if found[2] else ""])
    if found is None or size < 1:
        raise ValueError(f"--shard-size must be a size such as 64MB or 1GB, got {text!r}")
    return size

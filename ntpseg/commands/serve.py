"""The ``ntpseg serve`` command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ntpseg.commands.options import Device, Dtype, Method, Mirror, Passes, Samples, Threshold


def register(app: typer.Typer) -> None:
    """Add this module's commands to `app`."""
    app.command()(serve)


def serve(
    model: Annotated[
        Path, typer.Option(help="A run of `ntpseg train`, or a file of `ntpseg pack`.", show_default=False)
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; 0 takes a free one.")] = 8000,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Also serve this name, such as that of a proxy; repeat for more.")
    ] = None,
    method: Method = None,
    passes: Passes = None,
    samples: Samples = None,
    threshold: Threshold = None,
    mirror: Mirror = None,
    dtype: Dtype = "auto",
    device: Device = None,
) -> None:
    """Serve a web page: drop an image or a series, type a sentence, see the mask."""
    from ntpseg.generation import Segmenter
    from ntpseg.serving.examples import example_sentences
    from ntpseg.serving.options import ServerOptions
    from ntpseg.serving.server import listen, run_server
    from ntpseg.utils.device import usable_device
    from ntpseg.utils.outputs import check_path
    from ntpseg.utils.progress import disable_loading_bars

    disable_loading_bars()
    check_path("--model", model)
    options = ServerOptions(host=host, port=port, allowed_hosts=tuple(allow_host or ()))
    # Told before a large model is loaded.
    with listen(options) as listener:
        segmenter = Segmenter.from_pretrained(
            model,
            device=usable_device(device),
            method=method,
            passes=passes,
            samples=samples,
            threshold=threshold,
            mirror=mirror,
            dtype=dtype,
        )
        run_server(segmenter, options, listener, name=model.resolve().name, examples=example_sentences(model))

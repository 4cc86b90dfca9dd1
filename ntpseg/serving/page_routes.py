"""The page's own files, and what it asks about the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

from fastapi import FastAPI, Response

import ntpseg
from ntpseg.serving.options import ServerOptions
from ntpseg.serving.refusal import Refused
from ntpseg.serving.segmenting import Decodes

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
LIMITS = ("max_upload_bytes", "max_files", "max_text")


def add_page_routes(app: FastAPI, decodes: Decodes, options: ServerOptions, name: str, examples: Sequence[str]) -> None:
    """Add ``/``, the files that it loads and ``/api/model``."""
    # Read once: no request ever names a file of this machine.
    files = page_files()
    model = {"name": name, "version": ntpseg.__version__, "examples": list(examples), **describe(decodes)}
    model["limits"] = {key: value for key, value in asdict(options).items() if key in LIMITS}

    @app.get("/", include_in_schema=False)
    def page() -> Response:
        return Response(files["index.html"], media_type=MEDIA_TYPES[".html"])

    @app.get("/static/{file}", include_in_schema=False)
    def static(file: str) -> Response:
        if file not in files:
            raise Refused(404, "there is no such page")
        return Response(files[file], media_type=MEDIA_TYPES["." + file.rpartition(".")[2]])

    @app.get("/api/model")
    def about() -> dict[str, Any]:
        """The model: how it decodes, the window and axis of its training data, sentences to try, limits."""
        return model


def describe(decodes: Decodes) -> dict[str, Any]:
    """The model's part of ``/api/model``."""
    from ntpseg.volumes.windows import RULES, WINDOWS

    bundle = decodes.segmenter.bundle
    return {
        **decodes.describe(),
        "channels": bundle.vision.channels,
        "image_size": bundle.vision.image_size,
        "axis": bundle.volume.axis,
        "window": bundle.volume.window,
        "windows": [*RULES, *WINDOWS],
    }


def page_files() -> dict[str, bytes]:
    """The files of the page by their names."""
    folder = resources.files("ntpseg.serving") / "page"
    known = [file for file in folder.iterdir() if "." + file.name.rpartition(".")[2] in MEDIA_TYPES]
    return {file.name: file.read_bytes() for file in known}

"""Routes of images and their masks: upload, slices, downloads."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import anyio
import numpy as np
from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile

from ntpseg.data.images import encode_png
from ntpseg.serving.images import StoredImage, StoredMask
from ntpseg.serving.options import ServerOptions
from ntpseg.serving.refusal import Refused
from ntpseg.serving.store import ImageStore
from ntpseg.serving.uploads import open_upload

# Uploads that are received at once, and read at once: a volume takes several times its size while it is read.
RECEIVED, READ = 8, 1
UPLOAD_SCHEMA = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        "series": {"type": "string", "description": "Which one, where a 409 lists several."},
                    },
                    "required": ["files"],
                }
            }
        },
    }
}


def add_image_routes(app: FastAPI, store: ImageStore, options: ServerOptions) -> None:
    """Add the routes below ``/api/images``."""
    receiving = anyio.CapacityLimiter(RECEIVED)
    reading = anyio.CapacityLimiter(READ)

    @app.post("/api/images", status_code=201, openapi_extra=UPLOAD_SCHEMA)
    async def upload(request: Request) -> dict[str, Any]:
        """Open a picture, a volume's file, or the DICOM files of one series (also inside a .zip)."""
        if receiving.available_tokens < 1:
            raise Refused(503, "the server is busy; try again in a moment", {"Retry-After": "5"})
        async with receiving, request.form(max_files=options.max_files, max_fields=4, max_part_size=2**16) as form:
            parts = [part for part in form.getlist("files") if isinstance(part, UploadFile)]
            files = [(part.filename or "", part.file) for part in parts]
            series = form.get("series")
            async with reading:
                chosen = series if isinstance(series, str) else None
                image = await run_in_threadpool(open_upload, files, options, chosen)
        return {"id": store.add(image), **describe(image)}

    @app.delete("/api/images/{image}", status_code=204)
    def forget(image: str) -> None:
        """Forget an image and its masks."""
        store.remove(image)

    @app.get("/api/images/{image}/slice.png", response_class=Response)
    def one_slice(image: str, axis: str = "axial", index: int = 0, window: str = "auto") -> Response:
        """A slice as PNG, as it is displayed."""
        found = store.get(image)
        cut = found.check_place(axis, index)
        return Response(encode_png(found.pixels(cut, index, window[:100])), media_type="image/png")

    @app.get("/api/images/{image}/masks/{mask}.png", response_class=Response)
    def mask_png(
        image: str,
        mask: str,
        axis: str = "axial",
        index: int = 0,
        form: Literal["mask", "probability"] = "mask",
    ) -> Response:
        """A mask (0 and 255) or its probability (255 is 1) as PNG of the slice's own size."""
        found = store.get(image)
        own = _mask(found, mask)
        cut = found.check_place(own.axis or axis, index if own.index is None else own.index)
        pixels = own.slice(form, index, cut)
        return _download(encode_png(np.ascontiguousarray(pixels)), "image/png", f"{form}.png")

    @app.get("/api/images/{image}/masks/{mask}.nii.gz", response_class=Response)
    def mask_nifti(image: str, mask: str) -> Response:
        """The mask of a whole volume as NIfTI on the grid of the volume's file."""
        found = store.get(image)
        own = _mask(found, mask)
        if found.volume is None or own.mask.ndim != 3:
            raise Refused(400, "only the mask of a whole volume is a NIfTI file; segment the whole volume first")
        return _download(_nifti(found, own), "application/gzip", "mask.nii.gz")

    @app.delete("/api/images/{image}/masks/{mask}", status_code=204)
    def forget_mask(image: str, mask: str) -> None:
        """Forget a mask."""
        store.get(image).masks.pop(mask, None)


def describe(image: StoredImage) -> dict[str, Any]:
    """What the page needs to know of an image; of its header nothing but the kind of machine it comes from."""
    header = None if image.volume is None else image.volume.header
    return {
        "kind": "picture" if image.volume is None else "volume",
        "axes": image.axes(),
        "modality": "" if header is None else header.modality,
        "spacing_known": header is not None and header.spacing_known,
        "burnt_in": None if header is None else header.burnt_in,
        "notes": [] if header is None else list(header.notes),
        "header_window": bool(header is not None and header.windows),
    }


def _mask(image: StoredImage, name: str) -> StoredMask:
    if name not in image.masks:
        raise Refused(404, "there is no such mask, or no longer; segment again")
    return image.masks[name]


def _nifti(image: StoredImage, mask: StoredMask) -> bytes:
    from ntpseg.volumes.label_nifti import write_label_nifti

    assert image.volume is not None
    with tempfile.TemporaryDirectory(prefix="ntpseg-mask-") as folder:
        path = Path(folder) / "mask.nii.gz"
        write_label_nifti(path, image.volume.to_stored(mask.mask.astype(np.uint8)), image.volume.stored)
        return path.read_bytes()


def _download(content: bytes, media_type: str, name: str) -> Response:
    return Response(content, media_type=media_type, headers={"content-disposition": f'inline; filename="{name}"'})

"""The route that segments: its answer is a stream of events, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from ntpseg.data.tables import is_sentence
from ntpseg.serving.decoding_queue import DecodingQueue, Job
from ntpseg.serving.options import ServerOptions
from ntpseg.serving.refusal import Refused
from ntpseg.serving.segmenting import Decodes
from ntpseg.serving.store import ImageStore


class SegmentRequest(BaseModel):
    """What to segment in which image."""

    model_config = ConfigDict(extra="forbid")
    image: str = Field(max_length=64, description="The id of an image.")
    text: str = Field(description="The sentence.")
    axis: str = Field("axial", max_length=16, description="Of a volume: axial, coronal or sagittal.")
    index: int = Field(0, description="Of a volume: the slice.")
    window: str = Field("auto", max_length=100, description="Of a volume: the window that the model reads.")
    whole: bool = Field(False, description="Segment every slice of the volume along the axis.")


def add_segment_routes(
    app: FastAPI, store: ImageStore, decodes: Decodes, queue: DecodingQueue, options: ServerOptions
) -> None:
    """Add ``/api/segment``."""

    @app.post("/api/segment", response_class=StreamingResponse)
    async def segment(request: SegmentRequest) -> StreamingResponse:
        """Segment what a sentence refers to.

        Events: ``queued`` (jobs ahead), ``start``, ``tokens`` (first cell, codes, confidence, base64 of uint8 patches)
        or, of a whole volume, ``slice``, and at the end ``done`` with the mask's id or ``error`` with a message.
        """
        text = " ".join(request.text.split())
        if len(text) > options.max_text:
            raise Refused(422, f"text must have at most {options.max_text} characters, got {len(text):,}")
        if not is_sentence(text):
            raise Refused(422, "text must be a sentence that says what to segment, got none")
        image = store.get(request.image)
        cut = image.check_place(request.axis, request.index)
        window = request.window
        if request.whole:
            if image.volume is None:
                raise Refused(422, "whole must be false for a picture, got true")
            job = queue.submit(lambda job: decodes.whole(image, text, cut, window, job))
        else:
            job = queue.submit(lambda job: decodes.slice(image, text, cut, request.index, window, job))
        # X-Accel-Buffering: nginx passes each line on at once.
        return StreamingResponse(lines(job), media_type="application/x-ndjson", headers={"x-accel-buffering": "no"})


async def lines(job: Job) -> AsyncIterator[str]:
    """The events of a job as lines of JSON."""
    events = job.events()
    try:
        async for event in events:
            yield json.dumps(event, separators=(",", ":")) + "\n"
    finally:
        await events.aclose()  # type: ignore[attr-defined]

"""The application around the tiny segmenter."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_segmenter import TEXTS, shared


def make_app(method: str = "greedy", **options: Any) -> Any:
    pytest.importorskip("fastapi", reason='needs the extra "serve"')
    from ntpseg.generation import DecodingOptions, Segmenter
    from ntpseg.serving import ServerOptions, create_app

    segmenter = Segmenter(shared()[1], DecodingOptions(method=method, dtype="float32"))
    return create_app(segmenter, ServerOptions(**options), name="tiny", examples=TEXTS[:2])


def make_client(**options: Any) -> Any:
    """A client that calls the application in place."""
    pytest.importorskip("httpx")
    app = make_app(**options)
    from fastapi.testclient import TestClient

    return TestClient(app, base_url="http://127.0.0.1:8000")

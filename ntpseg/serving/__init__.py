"""``ntpseg serve``: a web page and an HTTP API in front of a `Segmenter`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntpseg.utils.lazy import lazy_exports

_EXPORTS = {"ServerOptions": "ntpseg.serving.options", "create_app": "ntpseg.serving.app"}

__all__ = ["ServerOptions", "create_app"]

__getattr__ = lazy_exports(__name__, _EXPORTS)

if TYPE_CHECKING:
    from ntpseg.serving.app import create_app as create_app
    from ntpseg.serving.options import ServerOptions as ServerOptions

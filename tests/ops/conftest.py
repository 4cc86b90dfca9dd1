from __future__ import annotations

import native_extension
import pytest


@pytest.fixture(scope="session", autouse=True)
def _native(tmp_path_factory: pytest.TempPathFactory) -> None:
    native_extension.ensure_built(tmp_path_factory.mktemp("build"))

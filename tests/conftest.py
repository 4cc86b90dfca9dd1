"""Settings for every test: no hub, one thread, Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# A busy machine is slow, not wrong.
settings.register_profile("ntpseg", deadline=None)
settings.load_profile("ntpseg")

if not torch.cuda.is_available():
    # Triton reads this when a kernel is decorated, so it must be set before the first import of a kernel module.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(int(os.environ.get("NTPSEG_TEST_THREADS", "1")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    # What one test switches off for the whole process fails the next hundred.
    assert torch.is_grad_enabled(), "this test left gradients switched off"

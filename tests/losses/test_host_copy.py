"""Counts on their way to the host."""

from __future__ import annotations

import pytest
import torch

from ntpseg.losses.host_copy import HostCopy


def test_values_arrive() -> None:
    assert HostCopy.start(torch.tensor([3, 1, 4])).wait() == [3, 1, 4]


def test_in_a_graph_the_option_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="max_rows must be set in a CUDA graph"):
        HostCopy.start(torch.tensor([1]))

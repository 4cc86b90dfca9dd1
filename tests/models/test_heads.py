"""The k heads: shapes, start, the three ways through `forward`, and what Hugging Face and ZeRO-3 need."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ntpseg import HardTokens, NextKHeads, ntp_loss


def make(k: int = 3, shared: bool = True, disturbed: bool = True) -> NextKHeads:
    heads = NextKHeads(8, 21, k, shared=shared)
    if disturbed and k > 1:
        torch.nn.init.normal_(heads.transform_weight, std=0.3)
        torch.nn.init.normal_(heads.transform_bias, std=0.3)
    return heads


def test_every_head_starts_as_head_0() -> None:
    heads = make(4, disturbed=False)
    hidden = torch.randn(2, 5, 8)
    states = heads(hidden)
    assert states.shape == (2, 5, 4, 8)
    for j in range(4):
        assert torch.equal(states[:, :, j], hidden)


def test_heads_learn_apart_from_their_start() -> None:
    heads = make(3, disturbed=False)
    labels = torch.randint(0, 21, (2, 9))
    heads.loss(torch.randn(2, 9, 8), labels).loss.backward()
    assert all(heads.transform_weight.grad[j].any() and heads.transform_bias.grad[j].any() for j in range(2))


def test_later_heads_are_medusa_residual_blocks() -> None:
    heads = make(3)
    hidden = torch.randn(2, 5, 8)
    states = heads(hidden)
    for j in (1, 2):
        block = F.silu(F.linear(hidden, heads.transform_weight[j - 1], heads.transform_bias[j - 1]))
        assert torch.allclose(states[:, :, j], hidden + block, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("k", [1, 3])
def test_loss_is_ntp_loss_of_the_states(k: int, shared: bool) -> None:
    heads = make(k, shared)
    hidden, labels = torch.randn(2, 9, 8), torch.randint(4, 15, (2, 9))
    labels[:, 3] = 7
    het = HardTokens(torch.tensor([[3], [3]]), torch.tensor([[5], [6]]))
    result = heads.loss(hidden, labels, negatives=2, het=het, vocab_range=(4, 15))
    plain = ntp_loss(heads(hidden), heads.weight, labels, negatives=2, het=het, vocab_range=(4, 15))
    assert torch.equal(result.loss, plain.loss)
    assert float(result.het) > 0


@pytest.mark.parametrize("shared", [True, False])
def test_logits(shared: bool) -> None:
    heads = make(3, shared)
    hidden = torch.randn(2, 8)
    every = heads.logits(hidden, heads=3)
    assert every.shape == (2, 3, 21)
    for j in range(3):
        matrix = heads.weight if shared else heads.weight[j]
        assert torch.allclose(every[:, j], heads(hidden)[:, j] @ matrix.t(), atol=1e-6)
    assert torch.allclose(heads.logits(hidden, heads=2, vocab_range=(3, 9)), every[:, :2, 3:9], atol=1e-6)
    assert torch.allclose(heads.logits(hidden)[:, 0], every[:, 0], atol=1e-6)


def test_every_path_goes_through_call() -> None:
    """ZeRO-3 and FSDP gather the weight in hooks that fire there and nowhere else."""
    heads = make(2)
    fired = []
    heads.register_forward_pre_hook(lambda *_: fired.append(1))
    hidden = torch.randn(1, 4, 8)
    heads.loss(hidden, torch.zeros(1, 4, dtype=torch.int64))
    heads.logits(hidden)
    heads(hidden)
    assert len(fired) == 3


def test_hugging_face_initialisation_leaves_the_start_alone() -> None:
    from transformers import PreTrainedConfig, PreTrainedModel, initialization

    class Model(PreTrainedModel):
        config_class = PreTrainedConfig

        def __init__(self, config: PreTrainedConfig) -> None:
            super().__init__(config)
            self.heads = NextKHeads(8, 21, 3)
            self.post_init()

        def _init_weights(self, module: torch.nn.Module) -> None:
            super()._init_weights(module)
            if isinstance(module, NextKHeads):
                module.init_weights(0.5, initialization.normal_, initialization.zeros_)

    model = Model(PreTrainedConfig())
    assert not model.heads.transform_weight.any()
    assert 0.3 < float(model.heads.weight.detach().std()) < 0.7


def test_state_round_trip_and_names() -> None:
    heads = make(2)
    assert set(heads.state_dict()) == {"weight", "transform_weight", "transform_bias"}
    assert set(make(1).state_dict()) == {"weight"}
    other = make(2)
    other.load_state_dict(heads.state_dict())
    hidden = torch.randn(1, 3, 8)
    assert torch.equal(heads(hidden), other(hidden))


def test_bfloat16_and_autocast() -> None:
    heads, labels = make(2), torch.randint(0, 21, (1, 6))
    hidden = torch.randn(1, 6, 8)
    exact = float(heads.loss(hidden, labels, negatives=0).loss.detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert float(heads.loss(hidden, labels, negatives=0).loss.detach()) == pytest.approx(exact, rel=2e-2)
        assert heads.logits(hidden, heads=2).dtype == torch.bfloat16
    lowered = heads.to(torch.bfloat16)
    assert float(lowered.loss(hidden.bfloat16(), labels, negatives=0).loss.detach()) == pytest.approx(exact, rel=2e-2)


@pytest.mark.parametrize(
    ("start", "call"),
    [
        ("k must", lambda: NextKHeads(8, 21, 0)),
        ("vocab_size must", lambda: NextKHeads(8, 2.5, 1)),
        ("hidden must", lambda: make()(torch.zeros(1, 2, 9))),
        ("logits_of must", lambda: make().logits(torch.zeros(1, 8), heads=4)),
        ("vocab_range must", lambda: make().logits(torch.zeros(1, 8), vocab_range=(5, 40))),
        ("vocab_range must", lambda: make().logits(torch.zeros(1, 8), vocab_range=(None, 7))),
        ("logits_of must", lambda: make().logits(torch.zeros(1, 8), heads=1.0)),
        ("labels must be given with negatives", lambda: make()(torch.zeros(1, 2, 8), negatives=2)),
    ],
)
def test_refused(start: str, call) -> None:
    with pytest.raises(ValueError, match=f"^{start}"):
        call()

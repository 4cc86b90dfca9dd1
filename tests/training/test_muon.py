"""Muon against the singular value decomposition and a naive optimizer in float64; AdamW's part against PyTorch's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ntpseg.models import NTPSegModel, preset_config
from ntpseg.tokenizers.sequence import SequenceFormat
from ntpseg.tokenizers.vocabulary import Vocabulary
from ntpseg.training.muon import _COEFFICIENTS, Muon, orthogonalize, split_parameters

BAND = 0.125


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(8, 8), (8, 20), (32, 288), (1, 5)])
def test_singular_values_are_near_1(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Also of a matrix whose singular values span two and a half orders of magnitude: its directions are kept."""
    rows = shape[0]
    matrices = torch.randn(3, *shape, dtype=dtype)
    left, _, right = torch.linalg.svd(matrices[2], full_matrices=False)
    matrices[2] = (
        left @ torch.diag(torch.logspace(0, -2.5, rows, dtype=dtype) if rows > 1 else left.new_ones(1)) @ right
    )
    for matrix, turned in zip(matrices, orthogonalize(matrices * 7.0)):
        values = torch.linalg.svdvals(turned)
        assert values.min() > 1 - BAND and values.max() < 1 + BAND
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.linalg.matrix_norm(turned - left @ right, 2) < BAND


def test_zero_matrices_stay_zero() -> None:
    assert not orthogonalize(torch.zeros(2, 3, 4)).any()


def naive_step(parameter: Tensor, gradient: Tensor, buffer: Tensor, lr: float, momentum: float, decay: float) -> None:
    """Everything in place, by the definition and on X itself instead of its Gram matrix."""
    buffer.mul_(momentum).add_(gradient, alpha=1 - momentum)
    update = (1 - momentum) * gradient + momentum * buffer
    matrix = update.reshape(len(update), -1)
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() * 1.01)
    for a, b, c in _COEFFICIENTS:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    x = x.T if tall else x
    scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
    parameter.mul_(1 - lr * decay).sub_(lr * scale * x.reshape(parameter.shape))


SHAPES = [(8, 20), (20, 8), (16, 3, 3, 3), (8, 20), (64, 2, 3, 3), (12, 12)]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_steps_equal_the_naive_ones(dtype: torch.dtype, limit: float) -> None:
    parameters = [nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape in SHAPES]
    naive = [p.detach().double().clone() for p in parameters]
    buffers = [torch.zeros_like(p) for p in naive]
    group = {"params": parameters, "muon": True, "weight_decay": 0.1, "lr": 0.05}
    optimizer = Muon([group], lr=1.0, momentum=0.9)
    for _ in range(4):
        for parameter, wide, buffer in zip(parameters, naive, buffers):
            parameter.grad = torch.randn_like(parameter)
            kept = parameter.grad.clone()
            naive_step(wide, kept.double(), buffer, 0.05, 0.9, 0.1)
        optimizer.step()
        assert torch.equal(parameters[-1].grad, kept), "gradients are left as they are"
    for parameter, wide in zip(parameters, naive):
        assert (parameter - wide).abs().max() < limit


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 16, 3)
        self.linear = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.conv(x).relu().mean((2, 3))).square().mean()


def make(net: Net) -> Muon:
    matrices = [net.conv.weight, net.linear.weight]
    groups = [{"params": matrices, "muon": True, "weight_decay": 0.0}, {"params": [net.conv.bias, net.linear.bias]}]
    return Muon(groups, lr=1e-2, betas=(0.9, 0.97), weight_decay=0.1)


def run(net: Net, optimizer: torch.optim.Optimizer, steps: int, seed: int) -> list[float]:
    losses = []
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = net(torch.randn(4, 2, 6, 6, generator=generator))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_rest_is_adamw_to_the_bit() -> None:
    parameters = [nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))]
    theirs = [nn.Parameter(p.detach().clone()) for p in parameters]
    options = {"betas": (0.9, 0.97), "eps": 1e-7, "weight_decay": 0.05}
    matrix = nn.Parameter(torch.randn(9, 9))
    optimizer = Muon([{"params": [matrix], "muon": True}, {"params": parameters}], lr=3e-3, **options)
    reference = AdamW(theirs, lr=3e-3, **options)
    for _ in range(5):
        for ours, other in zip(parameters, theirs):
            ours.grad = torch.randn_like(ours)
            other.grad = ours.grad.clone()
        matrix.grad = torch.randn(9, 9)
        optimizer.step()
        reference.step()
    for ours, other in zip(parameters, theirs):
        assert torch.equal(ours, other)


def test_a_state_dict_goes_on_to_the_bit(tmp_path) -> None:
    torch.manual_seed(1)
    net = Net()
    optimizer = make(net)
    run(net, optimizer, 3, 0)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    other = copy.deepcopy(net)
    again = make(other)
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    assert run(net, optimizer, 3, 1) == run(other, again, 3, 1)
    for ours, theirs in zip(net.parameters(), other.parameters()):
        assert torch.equal(ours, theirs)
    fresh = copy.deepcopy(net)
    assert run(net, optimizer, 3, 2) != run(fresh, make(fresh), 3, 2), "the state matters"


def test_the_loss_falls() -> None:
    net = Net()
    losses = run(net, make(net), 40, 0)
    assert losses[-1] < 0.2 * losses[0]


def test_parameters_without_a_gradient_stay() -> None:
    matrix, bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
    before = matrix.detach().clone(), bias.detach().clone()
    optimizer = Muon([{"params": [matrix], "muon": True, "weight_decay": 0.1}, {"params": [bias]}], lr=0.1)
    assert optimizer.step(lambda: 3.0) == 3.0
    assert torch.equal(matrix, before[0]) and torch.equal(bias, before[1])
    bias.grad = torch.ones(8)
    optimizer.step()
    assert torch.equal(matrix, before[0]) and not torch.equal(bias, before[1])


def test_which_weights_are_matrices() -> None:

    config = preset_config(
        "tiny",
        SequenceFormat(Vocabulary(40, 16, 8), (3, 3), (3, 3)),
        overrides={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8},
        grid_positions=True,
        front_end="both",
        image_size=12,
        patch_size=4,
        stem={"widths": [16, 32], "caption_dim": 8},
        dense_loss={"pixel": 1.0},
    )
    model = NTPSegModel(config)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, decayed, plain = ([names[id(p)] for p in group] for group in split_parameters(model))
    assert sorted([*matrices, *decayed, *plain]) == sorted(names.values())
    assert {"backbone.layers.0.mlp.up_proj.weight", "front_end.stem.encoder.levels.0.0.conv1.weight"} <= set(matrices)
    assert "front_end.caption.conv.weight" in matrices
    for name in ("heads.weight", "front_end.stem.draft.weight", "front_end.caption.project.weight"):
        assert name in decayed
    assert any(name.endswith("film.weight") for name in decayed)
    for name in ("backbone.embed_tokens.weight", "grid.mask_rows", "backbone.norm.weight"):
        assert name in plain
    assert any(name.endswith("norm1.bias") for name in plain)
    model.front_end.requires_grad_(False)
    frozen = [p for group in split_parameters(model) for p in group]
    assert not any(names[id(p)].startswith("front_end") for p in frozen)


@pytest.mark.parametrize("k", [4, 12])
def test_the_heads_transforms_are_no_matrix_of_all_heads(k) -> None:
    """Flattened, [k - 1, D, D] would be orthogonalised across heads, and a bias [k - 1, D] is none to decay."""
    sequence = SequenceFormat(Vocabulary(40, 16, 8), (3, 3), (3, 3))
    overrides = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    model = NTPSegModel(preset_config("tiny", sequence, overrides=overrides, num_heads_k=k))
    names = {id(p): name for name, p in model.named_parameters()}
    matrices, decayed, plain = ({names[id(p)] for p in group} for group in split_parameters(model))
    assert "heads.transform_weight" in decayed and "heads.transform_bias" in plain
    assert not any(name.startswith("heads.") for name in matrices)
    assert not any(name.endswith("bias") for name in matrices | decayed)


def test_wrong_input_is_named() -> None:
    bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match=r"muon parameters must have 2 dimensions or more, got \[5\]"):
        Muon([{"params": [bias], "muon": True}], lr=0.1)
    with pytest.raises(ValueError, match=r"momentum must be a number >= 0 and < 1, got 1.0"):
        Muon([{"params": [bias]}], lr=0.1, momentum=1.0)
    with pytest.raises(ValueError, match="muon_lr must be a number >= 0, got -1"):
        Muon([{"params": [bias]}], lr=0.1, muon_lr=-1)

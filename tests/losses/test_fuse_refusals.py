"""What `fuse_causal_lm` must refuse: every one of these would train on something else if it went through."""

from __future__ import annotations

import copy
import inspect
import pickle
import tempfile
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_llama import batch, build
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from ntpseg.losses.deferred_logits import CannotFuse
from ntpseg.losses.huggingface import _check_device, fuse_causal_lm, is_fused, unfuse_causal_lm

BART = {"vocab_size": 97, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 32}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}


class LoraLinear(nn.Module):
    """What PEFT puts in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight


class OffloadHook:
    """The part of accelerate's AlignDevicesHook that matters here."""

    offload = True


class NormalisedHead(nn.Linear):
    """A head with a forward of its own."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(F.normalize(hidden, dim=-1), self.weight)


class OwnCrossEntropy(LlamaForCausalLM):
    """A subclass that computes its loss from logits itself."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class NoisyLogits(LlamaForCausalLM):
    """A subclass that adds to its logits."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        logits = logits + torch.arange(97.0)
        return CausalLMOutputWithPast(loss=self.loss_function(logits, labels, 97), logits=logits)


class WeightDirectly(LlamaForCausalLM):
    """A subclass that goes around its output head."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.model(input_ids).last_hidden_state @ self.lm_head.weight.T
        return CausalLMOutputWithPast(loss=self.loss_function(logits, labels, 97), logits=logits)


class WritesLogits(LlamaForCausalLM):
    """A subclass that writes into its logits."""

    where: Any = (..., [3, 5])
    value: Any = float("-inf")

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        logits[self.where] = self.value
        return CausalLMOutputWithPast(loss=self.loss_function(logits, labels, 97), logits=logits)


class TwoLosses(LlamaForCausalLM):
    """A subclass that supervises twice, as multi-token prediction does."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = self.loss_function(logits, labels, 97) + self.loss_function(logits, labels.roll(-1, 1), 97)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def patched_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A forward as those that Liger and cut cross-entropy put on instances: it goes around loss_function."""
    given = {**dict(zip(inspect.signature(LlamaForCausalLM.forward).parameters, (self, *args))), **kwargs}
    return OwnCrossEntropy.forward(self, given["input_ids"], given.get("labels"))


class Wrapped(nn.Module):
    """A model in another, as in DistributedDataParallel."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def reloaded(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def user_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
    return logits.float().logsumexp(-1).mean()


def spoil(kind: str) -> nn.Module:
    model = build()
    head = model.lm_head
    if kind == "lora":
        model.lm_head = LoraLinear(head)
    elif kind == "offloaded":
        head._hf_hook = OffloadHook()
    elif kind == "meta":
        model.lm_head = head.to("meta")
    elif kind == "quantised":
        head.weight = nn.Parameter(torch.zeros(97, 16, dtype=torch.int8), requires_grad=False)
    elif kind == "headless":
        return model.model
    elif kind == "own head":
        model.lm_head = NormalisedHead(16, 97, bias=False)
    elif kind == "patched head":
        head.forward = lambda hidden: F.linear(hidden, head.weight) ** 2
    elif kind == "patched model":
        model.forward = lambda **kwargs: None
    elif kind == "added by a hook":
        head.register_forward_hook(lambda module, args, out: out + 1)
    elif kind == "doubled by a hook":
        head.register_forward_hook(lambda module, args, out: out * 2)
    elif kind == "hook on the gradient":
        head.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))
    elif kind == "user's loss":
        model.loss_function = user_loss
    elif kind == "another loss type":
        model.loss_type = "ForMaskedLM"
    elif kind == "encoder-decoder":
        return BartForConditionalGeneration(BartConfig(**BART))
    elif kind == "unshifted":
        return BartForCausalLM(BartConfig(**BART))
    elif kind == "nothing loaded":
        nn.init.constant_(model.model.embed_tokens.weight, float("nan"))
    else:
        kinds = {"own loss": OwnCrossEntropy, "noisy": NoisyLogits, "around": WeightDirectly, "twice": TwoLosses}
        return build(kinds[kind])
    return model


REFUSALS = {
    "lora": "wrapped by an adapter",
    "offloaded": "offloads between calls",
    "meta": "offloads between calls",
    "quantised": "not be quantised",
    "headless": "must be a causal language model",
    "own head": "forward must be that of torch.nn.Linear",
    "patched head": "forward must be that of torch.nn.Linear",
    "patched model": r"model\.forward must be that of LlamaForCausalLM",
    "added by a hook": r"got torch's add of them|got __add__ on them",
    "doubled by a hook": "hooks of the output head must not change its output",
    "hook on the gradient": "must have no backward hooks",
    "user's loss": "loss_function must be transformers' ForCausalLMLoss, got user_loss",
    "another loss type": "loss_function must be transformers' ForCausalLMLoss, got ForMaskedLMLoss",
    "encoder-decoder": "an encoder-decoder: .* with shift=False where each position's logits are for the label at that",
    "unshifted": r"must take its loss from self\.loss_function\(logits, labels\)",
    "nothing loaded": "must have a finite loss on random tokens",
    "own loss": r"must take its loss from self\.loss_function\(logits, labels\)",
    "noisy": "must take its loss .* got __add__ on them",
    "around": "must pass the logits of its output head to self.loss_function",
    "twice": r"must call self\.loss_function once",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_refused(kind: str) -> None:
    model = spoil(kind)
    with pytest.raises(ValueError, match=REFUSALS[kind]):
        fuse_causal_lm(model, negatives=0)
    assert kind == "headless" or not is_fused(model)


@pytest.mark.parametrize("kind", ["unshifted", "own loss", "noisy", "around", "twice", "added by a hook"])
def test_refused_in_the_first_call_without_the_check(kind: str) -> None:
    model = fuse_causal_lm(spoil(kind), negatives=0, check=False)
    with pytest.raises(ValueError, match="must"):
        model(**batch())


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ((..., [3, 5]), 0.0),
        ((..., [3, 5]), -100.0),
        ((..., [3, 5]), torch.zeros(2)),
        ((slice(None), slice(0, 4)), float("-inf")),
        ((0, ..., 5), float("-inf")),
        ((slice(None), 2, torch.tensor([3])), float("-inf")),
        (..., float("-inf")),
        (torch.ones(2, 11, 97) > 0, float("-inf")),
    ],
    ids=["zero", "finite", "tensor", "positions", "a row", "a position", "everything", "mask of entries"],
)
def test_only_masks_of_classes_are_left_out(where: Any, value: Any) -> None:
    model = fuse_causal_lm(build(WritesLogits), negatives=0, check=False)
    model.where, model.value = where, value
    with pytest.raises(ValueError, match=r"got writing .* into \[.*\] of them, which masks no classes"):
        model(**batch())


def test_masks_of_classes_are_left_out_without_the_check() -> None:
    model, plain = fuse_causal_lm(build(WritesLogits), negatives=0, check=False), build()
    truth = float(plain(**batch()).loss.detach())
    for where in ((..., [3, 5]), (slice(None), slice(None), torch.tensor([3])), (..., slice(3, 9)), (..., 4)):
        for value in (float("-inf"), torch.finfo(torch.float32).min):
            model.where, model.value = where, value
            assert float(model(**batch()).loss.detach()) == pytest.approx(truth, rel=1e-5)


def test_refused_when_it_changes_later() -> None:
    model = fuse_causal_lm(build(), negatives=0)
    model.loss_function = user_loss
    with pytest.raises(ValueError, match="was loss_function replaced"):
        model(**batch())
    model = fuse_causal_lm(build(), negatives=0)
    model.lm_head = LoraLinear(model.lm_head)
    with pytest.raises(ValueError, match="wrapped by an adapter"):
        model(**batch())
    model = fuse_causal_lm(build(), negatives=0)
    model.lm_head.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(ValueError, match="hooks of the output head must not change its output"):
        model(**batch())


@pytest.mark.parametrize(
    "change", [nn.Identity(), copy.deepcopy, reloaded, Wrapped], ids=["itself", "copied", "pickled", "wrapped"]
)
def test_refused_when_the_forward_is_replaced_later(change: Any) -> None:
    model = fuse_causal_lm(build(), negatives=5)
    changed = change(model)
    inner = getattr(changed, "module", changed)
    assert changed(**batch()).logits is None
    inner.forward = MethodType(patched_forward, inner)
    message = r"^model\.forward must be the one that fuse_causal_lm put there, got another"
    names = list(inspect.signature(LlamaForCausalLM.forward).parameters)
    positional = [batch().get(name) for name in names[1 : names.index("labels") + 1]]
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            changed(**batch())
        with pytest.raises(ValueError, match=message):
            changed(*positional)
    assert changed(input_ids=batch()["input_ids"]).logits is not None
    unfuse_causal_lm(inner)
    assert changed(**batch()).logits is not None
    assert not inner._forward_hooks
    assert not inner._forward_pre_hooks
    assert not inner._forward_hooks_with_kwargs


def test_refused_outside_of_a_labelled_call() -> None:
    model, inputs = fuse_causal_lm(build(), negatives=5), batch()
    logits = model(input_ids=inputs["input_ids"]).logits
    with pytest.raises(ValueError, match=r"^self\.loss_function must be called by the forward of the fused model"):
        model.loss_function(logits, inputs["labels"], 97)
    with torch.no_grad():  # nothing is trained on it
        assert float(model.loss_function(logits, inputs["labels"], 97)) > 0


@pytest.mark.parametrize("keywords", [{"logit_scale": 0.5}, {"softcap": 30.0}], ids=str)
def test_what_the_model_does_to_its_logits_is_no_option(keywords: dict) -> None:
    with pytest.raises(ValueError, match="logit_scale and softcap must be left to the model"):
        fuse_causal_lm(build(), **keywords)


@pytest.mark.parametrize("accepts", [True, False])
def test_trainers_label_smoothing_is_no_silent_bypass(accepts: bool) -> None:
    model = build()
    model.accepts_loss_kwargs = accepts  # False: Trainer passes num_items_in_batch to no such model
    fuse_causal_lm(model, negatives=0)
    assert model(input_ids=batch()["input_ids"]).logits is not None
    rows = [{name: value[0] for name, value in batch().items()}] * 4
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingArguments(
            folder, max_steps=1, label_smoothing_factor=0.1, report_to=[], save_strategy="no", disable_tqdm=True
        )
        with pytest.raises(ValueError, match=r"label_smoothing_factor .* Trainer takes the labels out"):
            Trainer(model, training, train_dataset=rows).train()
        training.label_smoothing_factor = 0.0
        with pytest.raises(ValueError, match="compute_loss_func"):
            Trainer(model, training, train_dataset=rows, compute_loss_func=lambda *_, **__: None).train()


def test_a_replica_of_data_parallel_is_told_from_the_model() -> None:
    """It calls the model that it is a copy of, whose weights lie on another GPU."""
    with FakeTensorMode():
        weight, here, there = (torch.empty(1, 3, device=f"cuda:{index}") for index in (0, 0, 1))
    model = SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=weight))
    _check_device(model, (here, None, 3))
    with pytest.raises(CannotFuse, match=r"device of the model's embedding, cuda:0, got cuda:1; .*torchrun"):
        _check_device(model, (None, there))

"""The one-call drop-in: equal to the models' own loss, and a clear refusal where it could not be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Emu3ForCausalLM,
    Emu3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from ntpseg import ntp_loss
from ntpseg.losses.huggingface import fuse_causal_lm

SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "emu3": (Emu3ForCausalLM, Emu3TextConfig),
}


def build(family: str = "llama", **more) -> nn.Module:
    torch.manual_seed(0)
    model, config = FAMILIES[family]
    return model(config(**(SIZES | more)))


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 97, (2, 11))
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_the_models_own(family: str, tied: bool) -> None:
    inputs, results = batch(), []
    for fused in (False, True):
        model = build(family, tie_word_embeddings=tied)
        if fused:
            assert fuse_causal_lm(model, negatives=0) is model
        out = model(**inputs, num_items_in_batch=torch.tensor(10))
        assert (out.logits is None) == fused
        out.loss.backward()
        results.append((out.loss.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (loss, grads), (result, found_grads) = results
    assert float(result) == pytest.approx(float(loss), rel=1e-5)
    for name, grad in grads.items():
        assert torch.allclose(found_grads[name], grad, rtol=1e-3, atol=1e-6), name


def test_chameleon_trains_on_image_tokens_too() -> None:
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "num_embeddings": 8, "base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1}
    names = {f"IMGIMG{chr(65 + i)}Z": 4 + i for i in range(8)} | {"<image>": 90}
    config = ChameleonConfig(**SIZES, vq_config=sizes | {"latent_dim": 32}, vocabulary_map=names)
    model = ChameleonForConditionalGeneration(config).eval()
    inputs = batch()
    inputs["input_ids"] = inputs["labels"].clamp_min(10)
    states = model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
    expected = ntp_loss(states, model.lm_head.weight, inputs["labels"], backend="reference", negatives=0).loss
    with pytest.raises(ValueError, match=r"writing into them \(a mask of classes\)"):
        fuse_causal_lm(model, negatives=0)
    result = fuse_causal_lm(model, negatives=0, check=False)(**inputs).loss
    assert float(result.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


def test_tcl_het_and_token_weights_come_from_the_batch() -> None:
    model, inputs = build(), batch()
    fuse_causal_lm(model, negatives=3, het_weight=2.0)
    plain = model(**inputs).loss
    position, token = torch.full((2, 1), 7), (inputs["labels"][:, 7:8] + 1) % 97
    harder = model(**inputs, het_position=position, het_token=token).loss
    assert float(harder.detach()) > float(plain.detach()) + 0.1
    weights = torch.zeros(2, 11)
    weights[:, 5] = 1.0
    assert float(model(**inputs, token_weights=weights).loss.detach()) != float(plain.detach())


def test_nothing_changes_without_labels() -> None:
    model, inputs = build().eval(), batch()
    ids = inputs["input_ids"]
    before, written = model(ids).logits, model.generate(ids, max_new_tokens=3, do_sample=False)
    fuse_causal_lm(model)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), written)


def test_a_copied_model_uses_its_own_weights() -> None:
    model, inputs = fuse_causal_lm(build(), negatives=0), batch()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert float(twin(**inputs).loss.detach()) == pytest.approx(float(torch.tensor(97.0).log()))
    assert float(model(**inputs).loss.detach()) != float(twin(**inputs).loss.detach())

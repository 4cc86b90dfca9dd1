"""`NTPSegModel` as the tools of Hugging Face expect a model: embeddings, sizes, outputs, auto classes, adapters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ntpseg.models import NTPSegConfig, NTPSegModel


def test_tied_embeddings(make_model, batch, tmp_path: Path) -> None:
    model = make_model()
    assert model.heads.weight is not model.get_input_embeddings().weight
    model.config.tie_word_embeddings = True
    tied = NTPSegModel(model.config)
    assert tied.heads.weight is tied.get_input_embeddings().weight
    tied(**batch).loss.backward()
    tied.save_pretrained(tmp_path)
    loaded = NTPSegModel.from_pretrained(tmp_path)
    assert loaded.heads.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded.heads.weight, tied.heads.weight)


@pytest.mark.parametrize("tied", [False, True])
def test_resize(make_model, batch, tied: bool, tmp_path: Path) -> None:
    config = make_model().config
    config.tie_word_embeddings = tied
    torch.manual_seed(0)
    model = NTPSegModel(config)
    size, before = config.vocab_size, model(**batch)
    assert model.resize_token_embeddings(size + 7).num_embeddings == size + 7
    assert model.heads.weight.shape[0] == model.heads.vocab_size == size + 7
    assert model.config.vocab_size == model.config.text_config.vocab_size == size + 7
    assert (model.heads.weight is model.get_input_embeddings().weight) == tied
    after = model(**batch)  # new ids are outside of vocab_range
    assert float(after.loss.detach()) == pytest.approx(float(before.loss.detach()), rel=1e-6)
    model.save_pretrained(tmp_path)
    assert torch.equal(NTPSegModel.from_pretrained(tmp_path).heads.weight, model.heads.weight)
    model.resize_token_embeddings(size)
    assert float(model(**batch).loss.detach()) == pytest.approx(float(before.loss.detach()), rel=1e-6)
    with pytest.raises(ValueError, match=r"new_num_tokens must be >= .*, where a range of ids ends"):
        model.resize_token_embeddings(max(config.vocab_range[1], config.mask_range[1]) - 1)


def test_embeddings_and_outputs(make_model, batch) -> None:
    model = make_model()
    model.set_attn_implementation("eager")
    whole = model(**batch)
    embeds = model.embed(batch["input_ids"], batch["grid_ids"])
    same = model(inputs_embeds=embeds, labels=batch["labels"])
    assert float(same.loss.detach()) == float(whole.loss.detach())
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**batch, inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(labels=batch["labels"])
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert out.attentions[0].shape[1] == model.config.num_attention_heads
    loss, *_ = model(**batch, return_dict=False)
    assert float(loss.detach()) == float(whole.loss.detach())


class LowRank(nn.Module):
    """What an adapter of PEFT's ``target_parameters`` does to a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, weight.shape[-1]))
        self.b = nn.Parameter(torch.zeros(weight.shape[-2], 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


class Wrapped(nn.Module):
    """What PEFT puts around the module of such a parameter: a call, and nothing else of it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, *args, **kwargs):
        return self.base_layer(*args, **kwargs)


def test_an_adapter_on_the_heads_weight(make_model, batch) -> None:
    model = make_model()
    before = model(**batch).loss
    parametrize.register_parametrization(model.heads, "weight", LowRank(model.heads.weight))
    adapter = model.heads.parametrizations.weight[0]
    model.heads = Wrapped(model.heads)
    after = model(**batch).loss
    assert float(after.detach()) == pytest.approx(float(before.detach()), rel=1e-6)
    after.backward()
    assert adapter.b.grad.abs().sum() > 0
    assert model.next_token_logits(torch.randn(2, model.config.hidden_size)).shape == (2, model.config.vocab_size)


PLAIN = """
import sys
{first}
import ntpseg
{second}
assert "ntpseg.models.model" not in sys.modules
from transformers import AutoConfig, AutoModel
assert "ntpseg.models.model" not in sys.modules
model = AutoModel.from_pretrained({folder!r})
assert type(model).__name__ == "NTPSegModel", type(model)
assert type(AutoConfig.from_pretrained({folder!r})).__name__ == "NTPSegConfig"
assert AutoConfig.for_model("qwen2").model_type == "qwen2"
"""


@pytest.mark.parametrize("order", ["before", "after"])
def test_auto_classes_know_the_model_after_a_plain_import(make_model, order: str, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    early = "from transformers import AutoConfig"
    text = PLAIN.format(
        first=early if order == "after" else "",
        second="assert 'transformers' not in sys.modules" * (order == "before"),
        folder=str(tmp_path),
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sizes_of_the_decoder_are_in_the_configuration() -> None:
    config = NTPSegConfig(text_config={"model_type": "qwen2", "num_hidden_layers": 3, "num_attention_heads": 4})
    assert (config.num_hidden_layers, config.num_attention_heads) == (3, 4)
    assert "num_hidden_layers" not in config.to_dict()

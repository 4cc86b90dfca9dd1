"""What users and Trainer do with a fused model: labels, outputs, hooks, copies, new heads, evaluation."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import assert_same, batch, build, gradients
from torch import Tensor, nn
from transformers import GitConfig, GitForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.trainer_pt_utils import LabelSmoother

from ntpseg.losses.fused_output import FusedLMOutput
from ntpseg.losses.huggingface import fuse_causal_lm, is_fused, unfuse_causal_lm


class ModulesToSave(nn.Module):
    """What PEFT puts in the place of a module that ``modules_to_save`` names."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.original_module = base
        self.modules_to_save = nn.ModuleDict({"default": copy.deepcopy(base)})
        self.active_adapter = "default"
        self.disable_adapters = False
        base.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        return self.modules_to_save[self.active_adapter].weight

    def forward(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        head = self.original_module if self.disable_adapters else self.modules_to_save[self.active_adapter]
        return head(hidden, *args, **kwargs)


class Adapted(nn.Module):
    """The part of a PeftModel that matters here."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_model = base

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


def with_saved_head(model: Any) -> Any:
    model.lm_head = ModulesToSave(model.lm_head)
    return Adapted(model)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_head_in_modules_to_save(when: str) -> None:
    truth = gradients(with_saved_head(build()), batch())
    if when == "before":
        model = with_saved_head(fuse_causal_lm(build(), negatives=0))
    else:
        model = fuse_causal_lm(with_saved_head(build()), negatives=0)
    assert_same(gradients(model, batch()), truth)
    assert "base_model.lm_head.modules_to_save.default.weight" in truth
    unfuse_causal_lm(model)
    assert_same(gradients(model, batch()), truth)


def test_a_disabled_adapter_leaves_the_original_head() -> None:
    plain, model = with_saved_head(build()), fuse_causal_lm(with_saved_head(build()), negatives=0)
    losses = []
    for adapted in (plain, model):
        wrapper = adapted.base_model.lm_head
        with torch.no_grad():
            wrapper.modules_to_save["default"].weight.mul_(1.5)
        for wrapper.disable_adapters in (True, False):
            losses.append(float(adapted(**batch()).loss.detach()))
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-5)
    assert abs(losses[0] - losses[1]) > 0.1
    unfuse_causal_lm(model)
    assert "forward" not in vars(model.base_model.lm_head.original_module)


def test_peft_disables_its_adapters() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = fuse_causal_lm(peft.get_peft_model(build(), config), negatives=0)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    own = float(build()(**batch()).loss.detach())
    with model.disable_adapter():
        assert float(model(**batch()).loss.detach()) == pytest.approx(own, rel=1e-5)
    assert abs(float(model(**batch()).loss.detach()) - own) > 0.1


def resized(model: Any) -> Any:
    torch.manual_seed(3)
    model.resize_token_embeddings(113)
    return model


def other_head(model: Any) -> Any:
    torch.manual_seed(3)
    model.set_output_embeddings(nn.Linear(16, 97, bias=True))
    return model


def copied(model: Any) -> Any:
    return copy.deepcopy(model)


def reloaded(model: Any, folder: Path) -> Any:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize("change", [resized, other_head, copied, reloaded], ids=lambda change: change.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
def test_fusing_before_and_after_a_change(change: Any, when: str, tmp_path: Path) -> None:
    more = (tmp_path,) if change is reloaded else ()
    truth = gradients(change(build(), *more), batch())
    if when == "before":
        model = change(fuse_causal_lm(build(), negatives=0), *more)
    else:
        model = fuse_causal_lm(change(build(), *more), negatives=0)
    assert is_fused(model)
    assert model(**batch()).logits is None
    assert_same(gradients(model, batch()), truth)


def test_saved_and_loaded_as_transformers_does(tmp_path: Path) -> None:
    model = fuse_causal_lm(build(), negatives=0)
    model.save_pretrained(tmp_path)
    assert model.config.architectures == ["LlamaForCausalLM"]
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not is_fused(loaded)
    assert_same(gradients(loaded, batch()), gradients(model, batch()))


def test_a_copy_is_whole() -> None:
    model = fuse_causal_lm(build(), negatives=0)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert float(twin(**batch()).loss.detach()) == pytest.approx(float(torch.tensor(97.0).log()))
    assert float(model(**batch()).loss.detach()) > 1.1 * float(twin(**batch()).loss.detach())


def test_unfuse_restores_the_model() -> None:
    model = build()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    truth = gradients(model, batch())
    unfuse_causal_lm(fuse_causal_lm(fuse_causal_lm(model, negatives=0), negatives=2))
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not is_fused(unfuse_causal_lm(model))
    assert model(**batch()).logits is not None
    assert_same(gradients(model, batch()), truth)


def test_shifted_labels() -> None:
    """Context parallelism shifts before it cuts sequences, so that each rank's last label is not lost."""
    model = build()
    shifted = nn.functional.pad(batch()["labels"], (0, 1), value=-100)[:, 1:]
    half = {"input_ids": batch()["input_ids"][:, :6], "labels": batch()["labels"][:, :6]}
    half["shift_labels"] = shifted[:, :6].contiguous()
    truth = gradients(model, half | {"num_items_in_batch": 7})
    fuse_causal_lm(model, negatives=0)
    assert_same(gradients(model, half | {"num_items_in_batch": 7}), truth)
    whole = batch() | {"shift_labels": shifted}
    assert_same(gradients(model, whole), gradients(model, batch()))


def test_git_shifts_no_shifted_labels() -> None:
    """GIT takes the logits from shift_labels' presence: all of the text's with them, all but the last without."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    model = GitForCausalLM(GitConfig(**sizes, vocab_size=97, pad_token_id=0, vision_config=vision)).eval()
    inputs = batch() | {"pixel_values": torch.randn(2, 3, 32, 32)}
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    twice = inputs | {"labels": shifted, "shift_labels": shifted}
    truths = gradients(model, inputs), gradients(model, twice)
    fuse_causal_lm(model, negatives=0, check=False)
    for given, truth in zip((inputs, twice), truths):
        assert_same(gradients(model, given), truth)


class OwnShift(LlamaForCausalLM):
    """A subclass that shifts the labels itself, and hears nothing of shift_labels."""

    shifted: Any = None

    def forward(self, input_ids: Any = None, labels: Any = None) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = self.loss_function(logits, labels, 97, shift_labels=self.shifted)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def test_shift_labels_that_the_model_does_not_take() -> None:
    model, inputs = fuse_causal_lm(build(OwnShift), negatives=0, check=False), batch()
    shifted = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    truth = float(build()(**inputs).loss.detach())
    inputs |= {"labels": torch.full_like(shifted, 5), "shift_labels": shifted}
    assert float(model(**inputs).loss.detach()) == pytest.approx(truth, rel=1e-5)  # its None is not the user's
    model.shifted = shifted.clone()
    with pytest.raises(ValueError, match=r"^model must pass the batch's shift_labels .* got others from OwnShift"):
        model(**inputs)


def test_further_keywords_of_the_loss() -> None:
    model, inputs = build(), batch()
    inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == -100, 5)
    truth = gradients(model, inputs | {"ignore_index": 5})
    assert_same(gradients(fuse_causal_lm(model, negatives=0), inputs | {"ignore_index": 5}), truth)


def test_tuples_and_positional_arguments() -> None:
    model = fuse_causal_lm(build(), negatives=0)
    inputs = batch()
    whole = model(**inputs)
    assert isinstance(model(**inputs, return_dict=False), tuple)
    assert float(model(**inputs, return_dict=False)[0].detach()) == float(whole.loss.detach())
    names = [name for name in inspect.signature(LlamaForCausalLM.forward).parameters if name != "self"]
    positional = [inputs.get(name) for name in names[: names.index("labels") + 1]]
    assert float(model(*positional).loss.detach()) == float(whole.loss.detach())
    model.eval()
    _, logits = model(**inputs, return_dict=False, use_cache=False)
    assert logits.shape == (2, 11, 97)


def test_what_is_asked_for_besides_is_there() -> None:
    model = fuse_causal_lm(build(attn_implementation="eager"), negatives=0)
    out = model(**batch(), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 3
    assert len(out.attentions) == 2
    assert len(model(**batch(), output_hidden_states=True, skip_logits=True).hidden_states) == 3


def test_logits_in_eval_mode_unless_skipped() -> None:
    model, inputs = build().eval(), batch()
    truth = model(**inputs)
    fuse_causal_lm(model, negatives=0)
    out = model(**inputs)
    assert type(out) is type(truth)
    assert torch.allclose(out.logits, truth.logits, atol=1e-5)
    assert float(out.loss.detach()) == pytest.approx(float(truth.loss.detach()), rel=1e-5)
    short = model(**inputs, skip_logits=True)
    assert isinstance(short, FusedLMOutput)
    assert "logits" not in short
    supervised = inputs["labels"][:, 1:] != -100
    expected = torch.where(supervised, truth.logits[:, :-1].argmax(-1), -1)
    assert torch.equal(short.prediction[:, 1:], expected)
    nll = nn.functional.cross_entropy(truth.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    assert float(short.nll.sum() / supervised.sum()) == pytest.approx(float(nll.detach()), rel=1e-5)
    model.train()
    assert model(**inputs).logits is None
    assert model(**inputs, skip_logits=False).logits.shape == (2, 11, 97)


def test_hooks_that_watch_or_change_what_goes_in() -> None:
    seen: list[int] = []
    model = build()
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(2))
    truth = gradients(model, batch())
    fuse_causal_lm(model, negatives=0)
    seen.clear()
    assert_same(gradients(model, batch()), truth)
    assert set(seen) == {1, 2}


@pytest.mark.parametrize("factor", [2.0, torch.tensor(2.0)], ids=["number", "tensor"])
def test_a_hook_before_the_head_changes_loss_and_logits_once(factor: Any) -> None:
    model = build().eval()
    model.lm_head.register_forward_pre_hook(lambda _, args: (args[0] * factor,))
    truth = model(**batch())
    out = fuse_causal_lm(model, negatives=0)(**batch())
    assert float(out.loss.detach()) == pytest.approx(float(truth.loss.detach()), rel=1e-5)
    assert torch.allclose(out.logits, truth.logits, rtol=1e-4, atol=1e-5)


class Rows(torch.utils.data.Dataset):
    """A data set with a column that only the fused loss knows."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {name: value[0] for name, value in batch(1).items()}
        return row | {"token_weights": torch.arange(11.0), "something_else": torch.zeros(1)}


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder), report_to=[], save_strategy="no", disable_tqdm=True, per_device_eval_batch_size=2, **more
    )


def test_trainer_keeps_the_columns_of_the_loss_and_metrics_get_predictions(tmp_path: Path) -> None:
    model = fuse_causal_lm(build(), negatives=0, skip_logits=True)
    seen: dict[str, Any] = {}

    def metrics(prediction: Any) -> dict[str, float]:
        seen["prediction"], seen["nll"] = prediction.predictions
        return {}

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        supervised = columns["labels"][:, 1:] != -100
        return columns | {"num_weights_in_batch": float(columns["token_weights"][:, 1:][supervised].sum())}

    trainer = Trainer(model, arguments(tmp_path), eval_dataset=Rows(), compute_metrics=metrics, data_collator=collate)
    loss = trainer.evaluate()["eval_loss"]
    assert seen["prediction"].shape == (4, 11)
    weights = torch.arange(11.0)
    nll = torch.from_numpy(seen["nll"])[0]
    assert weights[nll > 0].sum() > 0
    assert loss == pytest.approx(float((weights * nll).sum() / weights[nll > 0].sum()), rel=1e-5)


def test_trainer_trains_as_without(tmp_path: Path) -> None:
    losses = []
    for fused in (False, True):
        model = fuse_causal_lm(build(), negatives=0) if fused else build()
        more = {"max_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
        rows = [{name: value[0] for name, value in batch(1).items()}] * 16
        trainer = Trainer(model, arguments(tmp_path, **more), train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_compiles() -> None:
    model = build(num_hidden_layers=1)
    truth = gradients(model, batch())
    fuse_causal_lm(model, negatives=0)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = gradients(compiled, batch())
    assert_same({name.removeprefix("_orig_mod."): value for name, value in found.items()}, truth)
    model.forward = lambda input_ids, labels: model.model(input_ids).last_hidden_state.sum()
    with pytest.raises(ValueError, match=r"model\.forward must be the one that fuse_causal_lm put there"):
        torch.compile(model, backend="eager")(**batch())


def test_label_smoothing_is_trainers() -> None:
    model, inputs = build(), batch()
    smoother = LabelSmoother(epsilon=0.1)
    labels = inputs["labels"]
    truth = smoother(model(input_ids=inputs["input_ids"]), labels, shift_labels=True)
    fuse_causal_lm(model, negatives=0, label_smoothing=0.1)
    assert float(model(**inputs).loss.detach()) == pytest.approx(float(truth.detach()), rel=1e-5)

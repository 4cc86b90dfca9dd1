"""Counts of a whole batch: under Trainer every part of the fused loss has the denominator that it has in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import assert_same, batch, build, gradients
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutputWithPast

from ntpseg.losses import NumItems, count_items
from ntpseg.losses.deferred_logits import CannotFuse
from ntpseg.losses.huggingface import fuse_causal_lm
from ntpseg.memory import HardTokens


def everything() -> dict[str, Tensor]:
    """A batch with hard tokens, of which one does not count, and token weights."""
    inputs = batch()
    position = torch.tensor([[7, 9], [5, 2]])
    weights = torch.linspace(0.1, 2.0, 22).reshape(2, 11)
    token = (inputs["labels"].gather(1, position).clamp_min(0) + 1) % 97
    return inputs | {"het_position": position, "het_token": token, "token_weights": weights}


def counted(inputs: dict[str, Tensor], weights: bool = True) -> NumItems:
    het = HardTokens(inputs["het_position"], inputs["het_token"])
    return count_items(inputs["labels"], 1, het=het, token_weights=inputs["token_weights"] if weights else None)


def in_batch(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """The counts by the names that a batch has for them."""
    items, plain = counted(inputs), counted(inputs, weights=False)
    return {
        "num_items_in_batch": torch.as_tensor(plain.rows).sum(),
        "num_het_in_batch": items.het,
        "num_weights_in_batch": torch.as_tensor(items.rows).sum(),
    }


class CountingTrainer(Trainer):
    """Puts into each micro-batch what Trainer does not count; docs/drop-in.md has it."""

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        counts = [counted(part) for part in batch_samples]
        for part in batch_samples:
            part["num_het_in_batch"] = sum(float(count.het) for count in counts)
            part["num_weights_in_batch"] = sum(float(count.rows) for count in counts)
        return super()._get_num_items_in_batch(batch_samples, device)


@pytest.mark.parametrize("steps", [1, 2])
def test_trainers_loss_is_that_of_the_whole_batch(steps: int, tmp_path: Path) -> None:
    inputs = everything()
    expected = float(fuse_causal_lm(build(), negatives=0)(**inputs).loss.detach())
    arguments = TrainingArguments(
        str(tmp_path),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        max_steps=1,
        logging_steps=1,
        learning_rate=0.0,
        per_device_train_batch_size=2 // steps,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=steps,
    )
    rows = [{name: value[row] for name, value in inputs.items()} for row in range(2)]
    trainer = CountingTrainer(fuse_causal_lm(build(), negatives=0), arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-3)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-3)
    with pytest.raises(ValueError, match="num_weights_in_batch must be given with token_weights"):
        Trainer(fuse_causal_lm(build(), negatives=0), arguments, train_dataset=rows).train()


@pytest.mark.parametrize("as_one", [False, True], ids=["numbers", "NumItems"])
def test_losses_of_micro_batches_add_up(as_one: bool) -> None:
    model, inputs = fuse_causal_lm(build(), negatives=3), everything()
    truth = gradients(model, inputs)
    counts = {"num_items_in_batch": counted(inputs)} if as_one else in_batch(inputs)
    parts = [
        gradients(model, {name: value[row : row + 1] for name, value in inputs.items()} | counts) for row in (0, 1)
    ]
    assert_same({name: parts[0][name] + parts[1][name] for name in truth}, truth)


@pytest.mark.parametrize("missing", ["num_het_in_batch", "num_weights_in_batch"])
def test_a_missing_count_is_no_other_count(missing: str) -> None:
    inputs = everything()
    counts = in_batch(inputs)
    del counts[missing]
    with pytest.raises(CannotFuse, match=rf"^{missing} must be given with .* and num_items_in_batch, got None"):
        fuse_causal_lm(build(), check=False)(**inputs, **counts)


def test_counts_that_do_not_fit() -> None:
    model, inputs = fuse_causal_lm(build(), check=False), everything()
    with pytest.raises(CannotFuse, match=r"^num_het_in_batch must be given with het_position"):
        model(**inputs, num_items_in_batch=NumItems(rows=counted(inputs).rows))
    for name in ("num_het_in_batch", "num_weights_in_batch"):
        with pytest.raises(CannotFuse, match=rf"^num_items_in_batch must be given with {name}, got None"):
            model(**inputs, **{name: 3})
    with pytest.raises(ValueError, match=r"^num_items_in_batch must be one number with further counts, got a NumItems"):
        model(**inputs, num_items_in_batch=counted(inputs), num_het_in_batch=3)


class OwnCount(LlamaForCausalLM):
    """A subclass that counts the labels itself."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        logits = self.lm_head(self.model(input_ids).last_hidden_state)
        loss = self.loss_function(logits, labels, 97, num_items_in_batch=7)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def test_a_models_own_count_is_of_labels_alone() -> None:
    model, inputs = fuse_causal_lm(build(OwnCount), negatives=0, check=False), everything()
    truth = float(build(OwnCount)(**batch()).loss.detach())
    assert float(model(**batch()).loss.detach()) == pytest.approx(truth, rel=1e-5)
    with pytest.raises(CannotFuse, match=r"^model must leave num_items_in_batch to a batch with .* from OwnCount"):
        model(**inputs)


def test_trainer_counts_by_its_own_ignore_index() -> None:
    model, inputs = fuse_causal_lm(build(), negatives=0, ignore_index=0), batch()
    inputs["labels"] = inputs["labels"].clamp_min(0)
    assert torch.isfinite(model(**inputs).loss)
    with pytest.raises(CannotFuse, match=r"^ignore_index must be -100 with num_items_in_batch, got 0: Trainer counts"):
        model(**inputs, num_items_in_batch=14)


@pytest.mark.parametrize("name", ["shift_labels", "token_weights", "het_position", "het_token", "num_het_in_batch"])
def test_nothing_of_the_loss_is_dropped_without_labels(name: str) -> None:
    model, inputs = fuse_causal_lm(build(), check=False), everything()
    more = inputs | {"shift_labels": inputs["labels"], "num_het_in_batch": 3.0}
    with pytest.raises(CannotFuse, match=rf"^labels must be given with {name}, got None"):
        model(input_ids=inputs["input_ids"], **{name: more[name]})

"""Training on packed rows is training on the batch: every figure of every step, the weights and the hard tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from toy import losses, make_toy, make_trainer, sequence_of

from ntpseg.training import Collator, TokenDataset
from ntpseg.training.config import load_config

EXACT = {"max_grad_norm": 1e9, "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize(("batch", "times", "workers"), [(4, 1, 0), (2, 2, 1)])
def test_every_step_is_that_of_the_padded_batch(tmp_path, batch, times, workers) -> None:
    toy = make_toy(7, variants=1)
    for row, texts in enumerate(toy.texts):
        toy.texts[row] = [text + "!" * (7 * row) for text in texts]
    names = ("loss", "ntp", "nktp", "tcl", "het", "token_accuracy", "eval_loss", "eval_nktp")
    runs = []
    for packing in (None, 500):
        trainer = make_trainer(
            toy,
            tmp_path,
            k=3,
            num_train_epochs=3,
            evaluate=True,
            eval_strategy="epoch",
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=times,
            dataloader_num_workers=workers,
            **EXACT,
        )
        trainer.data_collator = Collator(sequence_of(toy), packing=packing)
        batches = ["packing" in batch for batch in trainer.get_train_dataloader()]
        assert any(batches) if packing else not any(batches)
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        evaluations = [[line[n] for n in names[6:]] for line in trainer.state.log_history if "eval_loss" in line]
        runs.append((np.array(losses(trainer, *names[:6])), np.array(evaluations), weights, trainer))
    (one, one_eval, one_weights, padded), (two, two_eval, two_weights, packed) = runs
    assert one[-1][names.index("het")] > 0
    np.testing.assert_allclose(two, one, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(two_eval, one_eval, rtol=2e-4)
    torch.testing.assert_close(two_weights, one_weights, rtol=1e-3, atol=1e-5)
    for name in ("served", "recording"):
        a, b = (t.memory.state_dict()[name]["sample"] for t in (padded, packed))
        assert torch.equal(a, b)


def test_sequences_of_one_length_stay_as_they_are() -> None:
    toy = make_toy(4)
    data = make_data(toy, ["disc", "disk", "ring", "star"])
    assert "packing" not in Collator(sequence_of(toy), packing=5000)(data)
    data = make_data(toy, ["a", "b", "c", "a" * 90])
    batch = Collator(sequence_of(toy), packing=5000)(data)
    useful = sum(len(sample["input_ids"]) for sample in data)
    assert useful <= batch["packing"]["source"].numel() < useful + 8 < batch["input_ids"].numel()


def make_data(toy: Any, texts: list[str]) -> list[dict[str, Any]]:
    toy.texts = [[text] for text in texts]
    data = TokenDataset(toy, sequence_of(toy))
    return [data[i] for i in range(len(texts))]


def test_the_configuration_says_so(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {packing: 1024}\n")
    assert load_config(path).data.packing == 1024
    assert load_config("tiny").data.packing is None
    for wrong in ("0", "-5", "1.5", "true", "text"):
        with pytest.raises(ValueError, match=r"data\.packing|packing"):
            load_config("tiny", [f"data.packing={wrong}"])

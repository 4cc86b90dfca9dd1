from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import losses, make_toy, make_trainer

from ntpseg.training.checkpoint import memory_file

EXACT = {"max_grad_norm": 1e9, "optim": "sgd", "learning_rate": 0.05, "lr_scheduler_type": "constant"}


def test_accumulation_equals_a_large_batch(tmp_path) -> None:
    """Hard tokens and ragged batches included: every step's loss, its parts and the weights at the end."""
    toy = make_toy(7, variants=2)
    for row, texts in enumerate(toy.texts):
        toy.texts[row] = [text + "!" * row for text in texts]
    names = ("loss", "ntp", "nktp", "tcl", "het", "token_accuracy")
    runs = []
    for batch, times in ((4, 1), (2, 2), (1, 4)):
        trainer = make_trainer(
            toy,
            tmp_path,
            k=3,
            num_train_epochs=4,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=times,
            **EXACT,
        )
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        runs.append((losses(trainer, *names), weights))
    assert len(runs[0][0]) == 8
    assert runs[0][0][-1][names.index("het")] > 0
    for other, weights in runs[1:]:
        np.testing.assert_allclose(np.array(other), np.array(runs[0][0]), rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(weights, runs[0][1], rtol=1e-3, atol=1e-5)


def test_counts_are_those_of_the_loss(tmp_path) -> None:
    """Over the vocabulary's range, with a stored hard token outside it: dividing by the counts changes nothing."""
    trainer = make_trainer(make_toy(6), tmp_path, k=3)
    low, high = trainer.model.config.vocab_range
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    position = int((batch["labels"][0] != -100).nonzero()[0]) + torch.arange(4).repeat(4, 1)
    token = torch.tensor([low, high - 1, 0, low - 1]).repeat(4, 1)
    shape = batch["labels"].shape
    prediction = torch.full(shape, -1).scatter(1, position, token)
    trainer.memory.record(batch["sample_ids"], prediction, batch["labels"], torch.ones(shape))
    trainer.memory.advance()
    trainer.model.train()
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    inputs = {name: value for name, value in batch.items() if name != "sample_ids"}
    own, divided = trainer.model(**inputs), trainer.model(**inputs, num_items=items)
    assert 0 < float(items.het) <= 8 and float(own.het) > 0
    for name in ("loss", "ntp", "nktp", "tcl", "het"):
        torch.testing.assert_close(getattr(divided, name), getattr(own, name), msg=name)


def test_parts_add_up_and_each_strategy_can_be_off(tmp_path) -> None:
    toy = make_toy(8)
    names = ("loss", "ntp", "nktp", "tcl", "het")

    def run(k: int = 2, hard_tokens: int = 4, **options) -> np.ndarray:
        trainer = make_trainer(toy, tmp_path, k=k, hard_tokens=hard_tokens, model_options=options, num_train_epochs=3)
        trainer.train()
        return np.array(losses(trainer, *names))

    weighted = run(tcl_weight=0.5, het_weight=0.25)
    np.testing.assert_allclose(weighted[:, 0], weighted[:, 2] + 0.5 * weighted[:, 3] + 0.25 * weighted[:, 4], rtol=1e-5)
    assert (weighted[:2, 4] == 0).all() and (weighted[2:, 4] > 0).any(), "HET serves the previous epoch"
    assert (weighted[:, 1] != weighted[:, 2])[1:].all()
    no_heads = run(k=1)
    np.testing.assert_allclose(no_heads[:, 1], no_heads[:, 2], rtol=1e-6)
    assert (run(negatives=0)[:, 3] == 0).all()
    assert (run(hard_tokens=0)[:, 4] == 0).all()
    plain = run(k=1, hard_tokens=0, negatives=0)
    np.testing.assert_allclose(plain[:, 0], plain[:, 1], rtol=1e-6)


def test_evaluation_logs_parts(tmp_path) -> None:
    trainer = make_trainer(make_toy(6), tmp_path, evaluate=True, eval_strategy="epoch", per_device_eval_batch_size=3)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert len(lines) == 2
    for line in lines:
        assert line["eval_loss"] == pytest.approx(line["eval_nktp"] + line["eval_tcl"], rel=1e-5)
        assert 0 <= line["eval_token_accuracy"] <= 1
    before = trainer.memory.state_dict()
    trainer.evaluate()
    for name in ("served", "recording"):
        torch.testing.assert_close(trainer.memory.state_dict()[name], before[name], rtol=0, atol=0)


@pytest.mark.parametrize("every", [3, 2, "epoch"])
def test_resuming_is_exact(tmp_path, every) -> None:
    """From the middle of an epoch, from its very last step, and from an epoch's end; variants and HET included."""
    toy = make_toy(8, variants=1)
    names = ("loss", "het", "grad_norm", "learning_rate")
    save = {"save_strategy": "epoch"} if every == "epoch" else {"save_strategy": "steps", "save_steps": every}
    whole = make_trainer(toy, tmp_path / "whole", num_train_epochs=3, **save)
    whole.train()
    step = 2 if every == "epoch" else every
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    assert memory_file(checkpoint, 0).is_file()
    again = make_trainer(toy, tmp_path / "again", num_train_epochs=3, **save)
    torch.manual_seed(123)
    again.train(resume_from_checkpoint=str(checkpoint))
    # The restored state carries the log of the steps before.
    assert losses(again, *names)[step:] == losses(whole, *names)[step:]
    for one, two in zip(whole.model.parameters(), again.model.parameters()):
        assert torch.equal(one, two)


@pytest.mark.parametrize("every", [{"eval_strategy": "epoch"}, {"eval_strategy": "steps", "eval_steps": 1}])
def test_evaluation_takes_no_hard_tokens_from_training(tmp_path, every) -> None:
    """Each step from the second epoch on reads them, and no figure differs from a run that is never evaluated."""
    names = ("loss", "ntp", "nktp", "tcl", "het", "grad_norm")
    runs = []
    for fields in (every, {}):
        trainer = make_trainer(
            make_toy(10, variants=1),
            tmp_path,
            num_train_epochs=4,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            evaluate=bool(fields),
            **fields,
        )
        trainer.train()
        runs.append((losses(trainer, *names), [p.detach().clone() for p in trainer.model.parameters()]))
    (evaluated, weights), (plain, others) = runs
    assert len(evaluated) == 12 and all(line[names.index("het")] > 0 for line in evaluated[3:])
    assert evaluated == plain
    assert all(map(torch.equal, weights, others))


def test_evaluation_is_that_of_all_samples_whatever_the_batches(tmp_path) -> None:
    """Captions of any length, a last batch of one sample, losses on pixels, heads that see different rows."""
    toy = make_toy(7)
    for row, texts in enumerate(toy.texts):
        toy.texts[row] = [text + "!" * row for text in texts]
    results = []
    for size in (7, 3, 2):
        options = {"dense_loss": {"dice": 0.5, "pixel": 0.0}, "patch_size": 4, "head_weights": [1.0, 0.5, 0.25]}
        trainer = make_trainer(
            toy, tmp_path, k=3, model_options=options, evaluate=True, per_device_eval_batch_size=size
        )
        trainer.model.readout.set_patches(torch.from_numpy(toy.patches).float().view(-1, 4, 4))
        metrics = trainer.evaluate()
        results.append({name: metrics[f"eval_{name}"] for name in ("loss", "ntp", "nktp", "tcl", "dice")})
        batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(7)])
        batch.pop("sample_ids")
    whole = trainer.model.eval()(**batch)
    for result in results:
        assert result == pytest.approx({name: whole[name].item() for name in result}, rel=2e-6)


def test_a_log_over_several_steps_survives_a_kill(tmp_path) -> None:
    """The mean since the last log includes the steps before the checkpoint."""
    fields = {"num_train_epochs": 3, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(make_toy(8), tmp_path / "whole", **fields)
    whole.train()
    again = make_trainer(make_toy(8), tmp_path / "again", **fields)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    names = ("loss", "ntp", "tcl", "token_accuracy")
    assert len(losses(whole)) == 1 and losses(again, *names) == losses(whole, *names)


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_that_outlive_an_epoch_know_the_next_one(tmp_path, workers) -> None:
    fields = {"dataloader_num_workers": workers, "dataloader_persistent_workers": bool(workers)}
    trainer = make_trainer(make_toy(4, variants=5), tmp_path, **fields)
    seen, loader = [], trainer.get_train_dataloader()
    for epoch in (0, 1):
        trainer.train_dataset.set_epoch(epoch)
        seen.append({int(i): row for batch in loader for i, row in zip(batch["sample_ids"], batch["labels"].tolist())})
    data = trainer.train_dataset
    for epoch, samples in enumerate(seen):
        data.set_epoch(epoch)
        for index, labels in samples.items():
            expected = data[index]["labels"]
            assert [x for x in labels if x != -100] == [x for x in expected if x != -100]
    assert seen[0] != seen[1]

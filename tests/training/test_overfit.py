"""The whole chain can learn: eight pairs by heart, decoded token by token from the definition."""

from __future__ import annotations

import numpy as np
import torch
from toy import Toy, make_toy, make_trainer

from ntpseg.models import NTPSegModel
from ntpseg.tokenizers.sequence import SequenceFormat


def decode(model: NTPSegModel, toy: Toy, sequence: SequenceFormat) -> np.ndarray:
    """Masks by plain arg-max over the mask codes, the whole sequence read anew for every token."""
    model.eval()
    low, high = sequence.vocabulary.mask_range
    codes = []
    for index, image in enumerate(toy.image_codes[:, 0]):
        ids = list(sequence.prompt(toy.text_ids(index), image))
        start = len(ids)
        for place in range(sequence.num_target):
            token = sequence.forced(place)
            if token is None:
                tokens = torch.tensor(ids)[None]
                with torch.no_grad():
                    hidden = model(tokens, grid_ids=torch.tensor(sequence.grid_ids(tokens.numpy()))).last_hidden_state
                    token = low + int(model.next_token_logits(hidden[0, -1], vocab_range=(low, high)).argmax())
            ids.append(token)
        codes.append(sequence.parse(np.array(ids[start:])))
    return toy.decode(np.stack(codes))


def test_overfits_eight_pairs(tmp_path) -> None:
    toy = make_toy(8)
    trainer = make_trainer(
        toy, tmp_path, num_train_epochs=150, per_device_train_batch_size=8, learning_rate=3e-3, logging_steps=50
    )
    trainer.train()
    masks = decode(trainer.model, toy, trainer.train_dataset.sequence)
    dice = 2 * (masks & toy.masks).sum((1, 2)) / (masks.sum((1, 2)) + toy.masks.sum((1, 2)))
    assert dice.mean() > 0.95
    assert dice.min() > 0.8

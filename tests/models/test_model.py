from __future__ import annotations

import pytest
import torch

from ntpseg import HardTokens, NumItems
from ntpseg.models import NTPSegModel


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_families_train(make_model, batch, family) -> None:
    model = make_model(overrides={"model_type": family})
    out = model(**batch)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_loss_equals_the_heads_on_the_whole_sequence(make_model, batch) -> None:
    """The prompt is spared, and nothing changes by it: loss, parts and the per-token results in their places."""
    model = make_model()
    labels = batch["labels"]
    position = (labels != -100).int().argmax(1, keepdim=True) + torch.tensor([[0, 2, -20]])
    token = torch.full_like(position, model.config.vocab_range[0])
    out = model(**batch, het_position=position, het_token=token)
    hidden = model(batch["input_ids"], grid_ids=batch["grid_ids"]).last_hidden_state
    whole = model.heads.loss(
        hidden,
        labels,
        vocab_range=tuple(model.config.vocab_range),
        het=HardTokens(torch.where(position < 0, -1, position), token),
    )
    for name in ("loss", "ntp", "nktp", "tcl", "het"):
        torch.testing.assert_close(getattr(out, name), getattr(whole, name))
    assert out.het > 0
    for name in ("prediction", "nll", "margin"):
        torch.testing.assert_close(getattr(out, name), getattr(whole, name))


def test_padding_changes_nothing(make_model, batch) -> None:
    model = make_model()
    whole = model(**batch)
    parts = []
    for row in range(3):
        length = int((batch["labels"][row] != -100).nonzero().max()) + 1
        parts.append(model(**{k: v[row : row + 1, :length] for k, v in batch.items()}))
    torch.testing.assert_close(whole.nktp, torch.stack([p.nktp for p in parts]).mean())


def test_num_items_gives_the_large_batch(make_model, batch) -> None:
    model = make_model(het_weight=0.0)
    model(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    items = NumItems([(batch["labels"][:, 1 + j :] != -100).sum().item() for j in range(3)], 0)
    for part in (slice(0, 1), slice(1, 3)):
        model(**{k: v[part] for k, v in batch.items()}, num_items=items).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_each_strategy_off(make_model, batch) -> None:
    plain = make_model(num_heads_k=1, negatives=0, het_weight=0.0)(**batch)
    torch.testing.assert_close(plain.loss, plain.ntp)
    torch.testing.assert_close(plain.nktp, plain.ntp)
    assert plain.tcl == 0 and plain.het == 0
    one = make_model(num_heads_k=1)(**batch)
    assert one.tcl > 0
    many = make_model(negatives=0)(**batch)
    assert many.tcl == 0 and many.loss == many.nktp


def test_cached_decoding_equals_one_pass(make_model, batch) -> None:
    """Own-cell and next-cell embeddings need nothing but the token itself."""
    model = make_model().eval()
    ids, grid = batch["input_ids"][:1], batch["grid_ids"][:1]
    with torch.no_grad():
        whole = model(ids, grid_ids=grid).last_hidden_state
        cut = ids.shape[1] - 8
        out = model(ids[:, :cut], grid_ids=grid[:, :cut], use_cache=True)
        states = [out.last_hidden_state]
        for i, j in ((cut, cut + 1), (cut + 1, cut + 5), (cut + 5, cut + 8)):
            out = model(ids[:, i:j], grid_ids=grid[:, i:j], past_key_values=out.past_key_values, use_cache=True)
            states.append(out.last_hidden_state)
    torch.testing.assert_close(torch.cat(states, 1), whole, rtol=1e-4, atol=1e-5)


def test_grid_embedding_places(make_model, sequence) -> None:
    model = make_model()
    grid, table = model.grid, model.grid.table()
    image, mask = sequence.image_grid, sequence.mask_grid
    own = lambda r, c: grid.image_rows[r] + grid.image_columns[c]  # noqa: E731
    assert torch.equal(table[0], torch.zeros(32))
    torch.testing.assert_close(table[1 + 1 * image[1] + 2], own(1, 2))
    cell = 1 + image[0] * image[1] + 1 * mask[1] + 2  # mask cell (1, 2): next is (2, 0)
    torch.testing.assert_close(table[cell], grid.mask_rows[1] + grid.mask_columns[2] + own(2, 0))
    last = 1 + image[0] * image[1] + mask[0] * mask[1] - 1
    torch.testing.assert_close(table[last], grid.mask_rows[2] + grid.mask_columns[2])
    ids = torch.tensor([[sequence.vocabulary.bom, 0]])
    out = grid(torch.zeros(1, 2, dtype=torch.long), ids == sequence.vocabulary.bom)
    torch.testing.assert_close(out[0, 0], own(0, 0))
    assert not out[0, 1].any()


def test_grid_ids_are_needed(make_model, batch) -> None:
    with pytest.raises(ValueError, match=r"grid_ids must be .* got None"):
        make_model()(batch["input_ids"])
    make_model(grid_positions=False)(batch["input_ids"])


def test_save_and_load_give_equal_logits(make_model, batch, tmp_path) -> None:
    model = make_model().eval()
    model.save_pretrained(tmp_path)
    again = NTPSegModel.from_pretrained(tmp_path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    with torch.no_grad():
        hidden = [m(batch["input_ids"], grid_ids=batch["grid_ids"]).last_hidden_state for m in (model, again)]
    lo, hi = model.config.vocab_range
    assert torch.equal(model.next_token_logits(hidden[0]), again.next_token_logits(hidden[1]))
    sliced = model.next_token_logits(hidden[0], vocab_range=(lo, hi))
    torch.testing.assert_close(sliced, model.next_token_logits(hidden[0])[..., lo:hi])


def test_missing_weights_are_initialised(make_model, tmp_path) -> None:
    """A checkpoint without grid and heads (a plain decoder's) leaves them freshly drawn, not as raw memory."""
    make_model(grid_positions=False, num_heads_k=1).save_pretrained(tmp_path)
    config = make_model().config
    model = NTPSegModel.from_pretrained(tmp_path, config=config)
    for parameter in model.grid.parameters():
        assert 0.01 < parameter.std() < 0.03
    assert not model.heads.transform_weight.any()


def test_visual_embeddings_follow_the_codebook(make_model) -> None:
    model = make_model(overrides={"hidden_size": 64})
    image, mask = torch.randn(16, 4), torch.randn(8, 6)
    image[3] = image[5] + 0.01
    before = model.get_input_embeddings().weight.clone()
    model.init_visual_embeddings(image, mask, generator=torch.Generator().manual_seed(0))
    weight = model.get_input_embeddings().weight
    lo, hi = model.config.image_range
    rows = weight[lo:hi]
    assert torch.equal(weight[:lo], before[:lo])
    assert rows.std().item() == pytest.approx(0.02, rel=0.3)
    distance = torch.cdist(rows, rows)
    assert distance[3, 5] < 0.1 * distance.mean()
    with pytest.raises(ValueError, match=r"mask_codebook must be .* got \[7, 6\]"):
        model.init_visual_embeddings(image, mask[:7])

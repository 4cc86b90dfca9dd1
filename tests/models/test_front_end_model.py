"""`NTPSegModel` with a stem: training, precision, saving and loading, drafts in place of true mask tokens."""

from __future__ import annotations

import json

import pytest
import torch

from ntpseg.losses.dense import from_patches, pixel_loss, soft_dice_loss, soft_target_loss, to_patches
from ntpseg.models import NTPSegConfig, NTPSegModel
from ntpseg.models.stem import StemOutput

DENSE = {"dice": 0.5, "pixel": 1.0, "soft": 0.25}
INPUTS = {"replaced": 1.0, "draft": 0.7, "blank": 0.3}


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("front_end", ["features", "both"])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_weight_learns(make_feature_model, feature_batch, front_end, aligned, bf16) -> None:
    """In float32 and under the autocast that training uses."""
    model, sequence = make_feature_model(
        front_end, aligned=aligned, dense_loss=DENSE, mask_inputs={**INPUTS, "second_pass": 0.5}, prefix_lm=True
    )
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(**feature_batch(sequence))
    out.loss.backward()
    assert torch.isfinite(out.loss)
    # The caption's encoder learns as soon as its modulation has left the identity.
    lazy = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert {name.split(".")[1] for name in lazy} <= {"caption"}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    for name in ("dice", "pixel", "soft"):
        assert getattr(out, name) > 0 and not getattr(out, name).requires_grad


@pytest.mark.parametrize("dense", [None, {"dice": 0.5, "pixel": 0.0}])
def test_no_weight_waits_for_a_gradient_without_a_pixel_loss(make_feature_model, feature_batch, dense) -> None:
    model, sequence = make_feature_model(dense_loss=dense, mask_inputs=INPUTS)
    model.train()(**feature_batch(sequence)).loss.backward()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert all(name.startswith("front_end.stem.draft.") for name in frozen) and len(frozen) == 2
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_loss_is_the_weighted_sum_of_its_parts(make_feature_model, feature_batch) -> None:
    model, sequence = make_feature_model(dense_loss=DENSE)
    model.eval()
    batch = feature_batch(sequence)
    with torch.no_grad():
        out = model(**batch)
        stem = model.encode_image(batch["pixel_values"], batch["input_ids"])
        low, high = model.config.mask_range
        total = {"dice": 0.0, "pixel": 0.0, "soft": 0.0}
        for row in range(3):
            first = int((batch["labels"][row] != -100).int().argmax())
            hidden = out.last_hidden_state[row : row + 1, first - 1 : first + 8]
            logits = model.next_token_logits(hidden, vocab_range=(low, high))
            codes = batch["labels"][row : row + 1, first : first + 9] - low
            target = to_patches(batch["mask_pixels"][row : row + 1], 4)
            total["dice"] += float(soft_dice_loss(model.readout.expected(logits), target)) / 3
            total["soft"] += float(soft_target_loss(logits, codes, model.readout.similarity(4.0))) / 3
            total["pixel"] += float(pixel_loss(stem.draft[row : row + 1], target)) / 3
        for name, value in total.items():
            assert float(getattr(out, name)) == pytest.approx(value, rel=1e-5)
        assert float(out.loss) == pytest.approx(float(out.ntp) + sum(DENSE[n] * v for n, v in total.items()), rel=1e-5)
        # Without pixels the codes' own patches are the target.
        codes = torch.stack([row[row >= low][:9] - low for row in batch["labels"]])
        pixels = from_patches(model.readout.patches[codes], (3, 3))
        one = model(**{**batch, "mask_pixels": pixels})
        two = model(**{k: v for k, v in batch.items() if k != "mask_pixels"})
        torch.testing.assert_close(one.dice, two.dice)


def test_num_images_gives_the_large_batch(make_feature_model, feature_batch) -> None:
    model, sequence = make_feature_model(dense_loss=DENSE)
    batch = feature_batch(sequence, (3, 3, 3))
    model(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    items = float((batch["labels"][:, 1:] != -100).sum())
    for part in (slice(0, 1), slice(1, 3)):
        model(**{k: v[part] for k, v in batch.items()}, num_items=items, num_images=3.0).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_inputs_are_replaced_in_training_alone(make_feature_model, feature_batch) -> None:
    """Only mask codes are, labels stay, and blanks keep their cells."""
    model, sequence = make_feature_model(mask_inputs={"replaced": 1.0, "draft": 0.5, "blank": 0.5})
    batch = feature_batch(sequence)
    ids, seen = batch["input_ids"], []

    def record(module, inputs, output):
        seen.append(inputs[0])

    model.get_input_embeddings().register_forward_hook(record)
    model.train()
    for _ in range(8):
        model(**batch)
    read = torch.stack([x for x in seen if x.shape == ids.shape])
    low, high = model.config.mask_range
    mask = (ids >= low) & (ids < high)
    assert (read[:, ~mask] == ids[~mask]).all()
    inside = read[:, mask]
    blank = inside == sequence.vocabulary.pad
    assert (blank | ((inside >= low) & (inside < high))).all()
    assert 0.2 < blank.float().mean() < 0.8
    rows = torch.stack([(read[:, row] == sequence.vocabulary.pad)[:, mask[row]].float().mean(1) for row in range(3)])
    assert set(rows.unique().tolist()) == {0.0, 1.0}, "a sequence reads blanks or it does not"
    assert (inside != ids[mask]).any(0).all()
    seen.clear()
    model.eval()
    model(**batch)
    assert torch.equal(next(x for x in seen if x.shape == ids.shape), ids)


def test_drafts_are_the_stems_or_the_second_passs(make_feature_model, feature_batch) -> None:
    inputs = {"replaced": 1.0, "draft": 1.0, "blank": 0.0}
    model, sequence = make_feature_model(mask_inputs=inputs, dense_loss={"dice": 0.0, "pixel": 1.0})
    model.train()
    batch = feature_batch(sequence)
    ids, grid = batch["input_ids"], batch["grid_ids"]
    low = model.config.mask_range[0]
    places = model.mask_training.places(model, grid, ids)
    for row in range(3):
        first = int((batch["labels"][row] != -100).int().argmax())
        assert places[row].tolist() == list(range(first, first + 9))
    true = ids.gather(1, places) - low
    stem = model.encode_image(batch["pixel_values"], ids)
    own = model.readout.nearest(stem.draft.sigmoid())
    extra, untold = model.mask_training, AssertionError("no second pass was asked for")

    def refuse(ids):
        raise untold

    read = extra.replace_inputs(model, ids, grid, stem, refuse).gather(1, places) - low
    assert ((read == true) | (read == own)).all() and (read != true).any()
    model.config.mask_inputs["second_pass"] = 1.0
    extra = type(extra)(model.config)
    model.eval()
    with torch.no_grad():
        blanks = ids.scatter(1, places, sequence.vocabulary.pad)
        hidden = model(blanks, grid_ids=grid, stem_output=stem).last_hidden_state
        second = [model.next_token_logits(hidden[r, places[r] - 1], tuple(model.config.mask_range)) for r in range(3)]
        second = model.readout.nearest(model.readout.expected(torch.stack(second)))
        read = extra.replace_inputs(model, ids, grid, stem, lambda x: model(x, grid_ids=grid, stem_output=stem))
    read = read.gather(1, places) - low
    assert ((read == true) | (read == second)).all() and (read != true).any()
    assert (second != own).any()


def test_save_and_load(make_feature_model, feature_batch, tmp_path) -> None:
    """From meta tensors, as transformers 5 always loads; buffers and options included."""
    model, sequence = make_feature_model("both", dense_loss=DENSE, mask_inputs=INPUTS, prefix_lm=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval().save_pretrained(tmp_path)
    again = NTPSegModel.from_pretrained(tmp_path)
    fields = again.config.to_dict()
    for name, value in model.config.to_dict().items():
        assert name in ("_name_or_path", "text_config") or fields[name] == value, name
    for key, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    batch = feature_batch(sequence)
    inputs = {name: batch[name] for name in ("input_ids", "grid_ids", "pixel_values")}
    with torch.no_grad():
        one, two = (m(**inputs).last_hidden_state for m in (model, again))
    assert torch.equal(one, two)


def test_missing_weights_are_drawn_and_loaded_ones_left_alone(make_feature_model, tmp_path) -> None:
    """A model without a stem becomes one with a stem: what was there stays, the stem is drawn as a fresh one is."""
    plain, _ = make_feature_model("features", stem={"caption_dim": 0}, grid_positions=False)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(1.0)
    state = {k: v for k, v in plain.state_dict().items() if "front_end.stem.features" not in k}
    plain.save_pretrained(tmp_path, state_dict=state)
    target, _ = make_feature_model("features")
    model = NTPSegModel.from_pretrained(tmp_path, config=target.config)
    loaded = model.state_dict()
    for name, value in state.items():
        assert torch.equal(loaded[name], value), name
    stem = model.front_end.stem
    bound = stem.features.weight[0].numel() ** -0.5
    assert 0.3 * bound < stem.features.weight.std() and stem.features.weight.abs().max() <= bound
    films = [m for name, m in model.named_modules() if name.endswith(".film")]
    assert len(films) == 3 and not any(p.any() for film in films for p in film.parameters())
    assert 0.01 < model.grid.mask_rows.std() < 0.03
    assert 0.01 < model.front_end.caption.conv.weight.std() < 0.03


def test_older_configurations_have_the_defaults(make_model, make_feature_model, batch, tmp_path) -> None:
    model = make_model().eval()
    model.save_pretrained(tmp_path)
    new = ("front_end", "stem", "channels", "image_size", "text_size", "blank_token", "patch_size", "mask_inputs")
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for name in (*new, "dense_loss", "prefix_lm"):
        fields.pop(name)
    path.write_text(json.dumps(fields))
    again = NTPSegModel.from_pretrained(tmp_path).eval()
    assert again.front_end is None and again.readout is None and again.config.front_end == "codes"
    inputs = {name: batch[name] for name in ("input_ids", "grid_ids", "labels")}
    with torch.no_grad():
        assert torch.equal(model(**inputs).loss, again(**inputs).loss)
    # A field that an options class gained later has its default.
    fields = make_feature_model(mask_inputs=INPUTS, dense_loss=DENSE)[0].config.to_dict()
    del fields["stem"]["group_size"], fields["mask_inputs"]["second_pass"], fields["dense_loss"]["soft_temperature"]
    made = NTPSegConfig(**fields)
    assert (made.stem["group_size"], made.mask_inputs["second_pass"], made.dense_loss["soft_temperature"]) == (16, 0, 4)


def test_bfloat16_weights(make_feature_model, feature_batch) -> None:
    model, sequence = make_feature_model()
    batch = feature_batch(sequence)
    inputs = {name: batch[name] for name in ("input_ids", "grid_ids", "pixel_values")}
    with torch.no_grad():
        exact = model.eval()(**inputs).last_hidden_state
        rounded = model.to(torch.bfloat16)(**inputs).last_hidden_state
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.05 * exact.norm()


def test_a_given_stem_output_is_used(make_feature_model, feature_batch) -> None:
    model, sequence = make_feature_model()
    batch = feature_batch(sequence)
    inputs = {name: batch[name] for name in ("input_ids", "grid_ids")}
    with torch.no_grad():
        stem = model.encode_image(batch["pixel_values"], batch["input_ids"])
        assert torch.equal(
            model(**inputs, stem_output=stem).last_hidden_state,
            model(**inputs, pixel_values=batch["pixel_values"]).last_hidden_state,
        )
        other = model(**inputs, stem_output=StemOutput(stem.features * 2, stem.draft)).last_hidden_state
    assert not torch.allclose(other, model(**inputs, stem_output=stem).last_hidden_state)


def test_no_draft_is_read_of_a_stem_that_learns_none(make_feature_model, feature_batch, monkeypatch) -> None:
    model, sequence = make_feature_model(mask_inputs={"draft": 1.0}, dense_loss={"dice": 1.0, "pixel": 0.0})
    drafts = []

    def noted(codes, draft, num_codes, options):
        drafts.append(draft)
        return codes

    monkeypatch.setattr("ntpseg.models.mask_training.mask_inputs", noted)
    model.train()(**feature_batch(sequence))
    assert drafts == [None]


def test_embeddings_in_place_of_ids(make_feature_model, feature_batch) -> None:
    model, sequence = make_feature_model(dense_loss={"dice": 0.5, "pixel": 1.0})
    batch = feature_batch(sequence)
    stem = model.encode_image(batch.pop("pixel_values"), batch["input_ids"])
    expected = model(**batch, stem_output=stem)
    embeds = model.embed(batch.pop("input_ids"), batch["grid_ids"], stem.features)
    torch.testing.assert_close(model(inputs_embeds=embeds, **batch, stem_output=stem).loss, expected.loss)
    with pytest.raises(ValueError, match="stem_output must be given"):
        model(inputs_embeds=embeds, **batch)

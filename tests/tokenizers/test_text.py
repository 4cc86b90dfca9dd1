"""Text tokenizers: trained here, saved in Hugging Face's format, loaded from any such directory."""

from __future__ import annotations

import pytest

from ntpseg.tokenizers.text import encode_text, load_text_tokenizer, train_text_tokenizer

CAPTIONS = [
    "Bilateral pulmonary infection, two infected areas, upper left lung and lower right lung.",
    "Unilateral pulmonary infection, one infected area, lower left lung.",
] * 5


def test_any_text_survives_and_ids_stay_below_the_length(tmp_path):
    tokenizer = train_text_tokenizer(CAPTIONS, vocab_size=400)
    assert 256 < len(tokenizer) <= 400
    for text in (CAPTIONS[0], "Übergröße 肺 🫁 12*34", ""):
        ids = encode_text(tokenizer, text)
        assert all(0 <= i < len(tokenizer) for i in ids)
        assert tokenizer.decode(ids) == text
    assert len(encode_text(tokenizer, CAPTIONS[0])) < len(CAPTIONS[0]) / 3


def test_saved_tokenizer_loads_with_the_same_ids(tmp_path):
    tokenizer = train_text_tokenizer(CAPTIONS)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_text_tokenizer(tmp_path)
    assert len(loaded) == len(tokenizer)
    assert encode_text(loaded, CAPTIONS[1]) == encode_text(tokenizer, CAPTIONS[1])
    assert loaded.pad_token_id is not None


def test_training_twice_gives_the_same_vocabulary():
    assert train_text_tokenizer(CAPTIONS).get_vocab() == train_text_tokenizer(CAPTIONS).get_vocab()


def test_a_plain_vocab_and_merges_directory_loads(tmp_path):
    import json

    vocab = {c: i for i, c in enumerate(["l", "u", "n", "g", "lu", "ng"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("l u\nn g\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    assert encode_text(load_text_tokenizer(tmp_path), "lung") == [4, 5]


def test_wrong_input_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"vocab_size must be >= 257 .* got 256"):
        train_text_tokenizer(CAPTIONS, vocab_size=256)
    with pytest.raises(ValueError, match="captions must hold at least one sentence"):
        train_text_tokenizer([" ", ""])
    with pytest.raises(ValueError, match="does not exist"):
        load_text_tokenizer(tmp_path / "none")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_text_tokenizer(tmp_path)

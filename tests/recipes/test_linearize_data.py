"""Batches for linearising: what is cut, padded, held out and refused."""

import numpy as np
import pytest
import torch
from helpers import BERT, GPT2, VIT
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    GPT2Config,
    GPT2Model,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from hf_attn import InvalidInput
from hf_attn.recipes import linearize_data as data

WORDS = [f"w{i}" for i in range(20)]


def tokenizer(folder, pad: bool = True):
    """Whole words, [CLS] and [SEP] around them."""
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    made = BertTokenizer(str(folder / "vocab.txt"))
    if not pad:
        made.pad_token = None
    return made


def test_texts_are_cut_into_passages_of_each_length(tmp_path):
    texts = [" ".join(WORDS[:17]), " ".join(WORDS[:5])]
    batches = data.text_batches(texts, tokenizer(tmp_path), lengths=(6, 10), tokens=20)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 6), (3, 6), (1, 6), (2, 10), (2, 10)]
    for width, room in ((6, 4), (10, 8)):
        rows = torch.cat([batch["input_ids"] for batch in batches if batch["input_ids"].shape[1] == width])
        mask = torch.cat([batch["attention_mask"] for batch in batches if batch["input_ids"].shape[1] == width])
        assert torch.equal(mask, (rows != 0).long())
        assert (rows[:, 0] == 2).all() and (rows == 3).sum() == len(rows), "special tokens around every passage"
        words = sorted(rows[rows > 4].tolist())
        assert words == sorted([*range(5, 22), *range(5, 10)]), "every word once"
        assert sorted(mask.sum(1).tolist()) == sorted(
            2 + min(room, n - start) for n in (17, 5) for start in range(0, n, room)
        )


def test_order_and_limit_follow_the_seed(tmp_path):
    texts = [" ".join(WORDS)] * 4
    made = tokenizer(tmp_path)
    a, b, c = (data.text_batches(texts, made, (6,), tokens=6, limit=3, seed=seed) for seed in (1, 1, 2))
    assert len(a) == 3
    assert all(torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(a, b))
    assert not all(torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(a, c))


def test_without_a_padding_token_short_passages_are_left_out(tmp_path):
    batches = data.text_batches([" ".join(WORDS[:9])], tokenizer(tmp_path, pad=False), (6,))
    assert torch.cat([batch["input_ids"] for batch in batches]).shape == (2, 6)
    with pytest.raises(InvalidInput, match="no text has 16 tokens"):
        data.text_batches([" ".join(WORDS[:9])], tokenizer(tmp_path, pad=False), (16,))
    with pytest.raises(InvalidInput, match="length 2 leaves no room"):
        data.text_batches(["w1"], tokenizer(tmp_path), (2,))


def test_a_fifth_is_held_out_and_never_trained_on():
    train, held_out = data.split(list(range(20)), seed=3)
    assert len(held_out) == 4 and sorted(train + held_out) == list(range(20))
    assert data.split(list(range(20)), seed=3) == (train, held_out) != data.split(list(range(20)), seed=4)
    assert [len(part) for part in data.split([1, 2])] == [1, 1]
    with pytest.raises(InvalidInput, match="cannot be split"):
        data.split([1])


def test_texts_of_a_file_and_of_python(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n\n  three \n")
    assert data.texts_of(tmp_path / "a.txt") == ["one\ntwo", "three"]
    assert len(data.texts_of("pydoc")) > 50
    (tmp_path / "b.txt").write_text("\n\n")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\xfa")
    for name, message in (("b.txt", "holds no text"), ("c.txt", "is not UTF-8"), ("d.txt", "is no file")):
        with pytest.raises(InvalidInput, match=message):
            data.texts_of(tmp_path / name)


def test_images_of_a_folder_and_of_digits(tmp_path):
    from PIL import Image

    model = ViTModel(ViTConfig(**VIT))
    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(tmp_path)
    train, held_out = data.batches_for(model, str(tmp_path), limit=5, tokens=256)
    assert held_out[0]["pixel_values"].shape == (4, 3, 12, 12) and held_out[0]["labels"].shape == (4,)
    assert sum(len(batch["labels"]) for batch in train) == 1797 - 359
    assert sum(len(batch["labels"]) for batch in held_out) == 5
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(np.full((9, 7), 40 * i, dtype="uint8")).save(tmp_path / "photos" / f"{i}.png")
    train, held_out = data.batches_for(model, str(tmp_path), str(tmp_path / "photos"))
    assert len(train[0]["pixel_values"]) == 2 and list(held_out[0]) == ["pixel_values"]
    with pytest.raises(InvalidInput, match="is no folder with pictures"):
        data.images_of(tmp_path / "nowhere")


def test_the_model_says_what_it_takes(tmp_path):
    model = BertModel(BertConfig(**BERT))
    with pytest.raises(InvalidInput, match="has no tokenizer or image processor"):
        data.batches_for(GPT2Model(GPT2Config(**GPT2)), str(tmp_path))
    tokenizer(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match="takes 64 tokens at most"):
        data.batches_for(model, str(tmp_path), lengths=(32, 128))
    (tmp_path / "a.txt").write_text("\n\n".join([" ".join(WORDS)] * 10))
    train, held_out = data.batches_for(model, str(tmp_path), str(tmp_path / "a.txt"), lengths=(12, 22), limit=2)
    assert (
        {batch["input_ids"].shape[1] for batch in train}
        == {batch["input_ids"].shape[1] for batch in held_out}
        == {12, 22}
    )
    assert sum(len(batch["input_ids"]) for batch in held_out) == 4

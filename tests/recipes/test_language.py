"""Language modelling data: the embedded text, tokenizers, blocks, masks, and the loss over targets."""

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.recipes.data import DATASETS, source
from hf_attn.recipes.data_text import SHARED, pydoc, topic_groups
from hf_attn.recipes.language import Pad, Redrawn, blocks, hide_tokens
from hf_attn.recipes.objectives import IGNORED, CrossEntropy
from hf_attn.recipes.tokenizer import texts_of, train_tokenizer


@pytest.fixture(scope="module")
def text():
    return pydoc()


@pytest.fixture(scope="module")
def tokenizer(text):
    return train_tokenizer(texts_of(text["train"]), vocab_size=400)


def test_topics_that_share_a_paragraph_are_in_one_split(text):
    seen = {
        name: {p.strip() for row in split for p in row["text"].split("\n\n") if len(p.strip()) >= SHARED}
        for name, split in text.items()
    }
    for first, second in itertools.combinations(seen, 2):
        assert not seen[first] & seen[second]
    sizes = {name: sum(map(len, split["text"])) for name, split in text.items()}
    assert sizes["train"] >= 0.75 * sum(sizes.values()) and min(sizes.values()) > 0.02 * sum(sizes.values())


def test_the_text_split_is_seeded(text):
    assert pydoc()["test"]["topic"] == text["test"]["topic"] != pydoc(1)["test"]["topic"]


def test_a_topic_that_another_contains_is_left_out():
    long, other = "a" * SHARED, "b" * SHARED
    groups = topic_groups({"part": long, "whole": f"{long}\n\n{other}", "alone": "c" * SHARED, "again": "c" * SHARED})
    assert groups == [["whole"], ["again"]] or groups == [["again"], ["whole"]]


def test_a_trained_tokenizer_writes_any_text_and_reloads(tokenizer, text, tmp_path):
    sample = "def f(x):\n    return x ** 2  # \u00e9\u4e2d\U0001f600"
    ids = tokenizer(sample)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == sample
    assert ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id and len(tokenizer) == 400
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(sample)["input_ids"] == ids
    again = train_tokenizer(texts_of(text["train"]), vocab_size=400)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_a_vocabulary_smaller_than_the_alphabet_is_refused():
    with pytest.raises(InvalidOption, match="vocab_size=100 must be at least 261"):
        train_tokenizer(["text"], vocab_size=100)


@pytest.mark.parametrize("special", [True, False])
def test_blocks_hold_the_text_in_order(tokenizer, text, special):
    (found,) = blocks({"test": text["test"]}, tokenizer, 32, special).values()
    rows = found["input_ids"]
    assert {len(row) for row in rows} == {32}
    if special:
        assert all(row[0] == tokenizer.cls_token_id and row[-1] == tokenizer.sep_token_id for row in rows)
        rows = [row[1:-1] for row in rows]
    written = tokenizer.decode([token for row in rows for token in row])
    between = "" if special else tokenizer.eos_token
    assert between.join(text["test"]["text"]).startswith(written)


def test_a_split_shorter_than_a_block_is_refused(tokenizer, text):
    with pytest.raises(InvalidInput, match="less text than one block"):
        blocks({"test": text["test"].select([0])}, tokenizer, 100_000, special=False)
    with pytest.raises(InvalidOption, match="leaves no room"):
        blocks({"test": text["test"]}, tokenizer, 3, special=True)


def test_masks_hide_the_stated_share_and_no_special_token():
    ids, special = [0, *range(5, 205), 1], frozenset({0, 1, 4})
    random = np.random.default_rng(0)
    fates = np.zeros(3)
    for _ in range(200):
        made = hide_tokens(ids, random, 0.15, 4, 300, special)
        tokens, labels = np.array(made["input_ids"]), np.array(made["labels"])
        targets = labels != IGNORED
        assert targets.sum() == 30 and not targets[[0, -1]].any()
        assert (tokens[~targets] == np.array(ids)[~targets]).all()
        assert (labels[targets] == np.array(ids)[targets]).all()
        hidden, same = tokens[targets] == 4, tokens[targets] == labels[targets]
        fates += [hidden.sum(), (~hidden & ~same).sum(), same.sum()]
    assert np.allclose(fates / fates.sum(), [0.8, 0.1, 0.1], atol=0.01)


def test_a_random_part_depends_on_seed_epoch_and_index_only():
    data = Redrawn(range(4), lambda example, random: {"x": (example, int(random.integers(10**9)))}, seed=3)
    first = [data[i] for i in range(4)]
    assert [data[i] for i in reversed(range(4))] == first[::-1]
    data.redraw(1)
    second = [data[i] for i in range(4)]
    assert all(a != b for a, b in zip(first, second, strict=True))
    data.redraw(0)
    assert [data[i] for i in range(4)] == first
    # accelerate would call it in evaluations, too
    assert not hasattr(data, "set_epoch")


def test_padding_fills_each_key_with_its_own_value():
    batch = Pad(7)([{"input_ids": [1], "labels": [2], "attention_mask": [1]}, {"input_ids": [3, 4], "labels": [5, 6], "attention_mask": [1, 1]}])  # fmt: skip
    assert batch["input_ids"].tolist() == [[1, 7], [3, 4]]
    assert batch["labels"].tolist() == [[2, IGNORED], [5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert Pad(0)([{"labels": 3}, {"labels": 4}])["labels"].tolist() == [3, 4]


@pytest.mark.parametrize("shift", [False, True])
def test_the_loss_is_a_mean_over_targets_however_a_batch_is_divided(shift):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5, 11), torch.randint(0, 11, (6, 5))
    labels[torch.rand(6, 5) < 0.5] = IGNORED
    labels[:, 0] = IGNORED
    objective = CrossEntropy(shift=shift, perplexity=True)
    items = (labels[:, 1:] != IGNORED).sum() if shift else (labels != IGNORED).sum()
    whole = objective.loss({"logits": logits}, labels, items)
    parts = [objective.loss({"logits": logits[i : i + 2]}, labels[i : i + 2], items) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole)
    sums = torch.cat([objective.sums(logits[i : i + 3], labels[i : i + 3]) for i in (0, 3)])

    class Prediction:
        predictions = sums.numpy()

    assert objective.metrics(Prediction)["perplexity"] == pytest.approx(whole.exp().item(), rel=1e-5)
    aligned = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
    targets = aligned[1] != IGNORED
    accuracy = (aligned[0].argmax(-1) == aligned[1])[targets].float().mean().item()
    assert objective.metrics(Prediction)["accuracy"] == pytest.approx(accuracy)


def test_an_unknown_option_of_an_embedded_set_names_the_nearest():
    with pytest.raises(InvalidOption, match="did you mean 'max_depth'"):
        source("listops", {"max_dept": 3})
    assert set(DATASETS) == {"digits", "photos", "pydoc", "listops", "mqar"}

"""ListOps and multi-query associative recall: their values, parameters and seeds."""

import numpy as np
import pytest

from hf_attn.errors import InvalidOption
from hf_attn.recipes.data_synthetic import apply_operator, draw_mqar, listops, mqar

SMALL = {"train_examples": 60, "held_out_examples": 20}


def value_of(text: str) -> int:
    """The value of an expression, by a stack: another way than the generator's."""
    stack: list[list] = [[]]
    for word in text.split():
        if word.startswith("["):
            stack.append([word])
        elif word == "]":
            operator, *values = stack.pop()
            result = {
                "[MIN": lambda v: min(v),
                "[MAX": lambda v: max(v),
                "[MED": lambda v: int(np.median(v)),
                "[SM": lambda v: sum(v) % 10,
            }[operator](values)
            stack[-1].append(result)
        else:
            stack[-1].append(int(word))
    ((value,),) = stack
    return value


def test_listops_labels_are_the_values_of_the_expressions():
    data = listops(**SMALL)
    texts = [row["text"] for split in data.values() for row in split]
    assert len(set(texts)) == len(texts) == 100
    for split in data.values():
        for row in split:
            assert value_of(row["text"]) == row["labels"]
            assert 16 < len(row["text"].split()) < 64
    operators = {word for text in texts for word in text.split() if word.startswith("[")}
    assert operators == {"[MIN", "[MAX", "[MED", "[SM"}


def test_listops_keeps_its_bounds():
    data = listops(**SMALL, max_depth=3, max_args=3, min_length=4, max_length=12)
    for row in data["train"]:
        depth = deepest = 0
        for word in row["text"].split():
            depth += word.startswith("[") - (word == "]")
            deepest = max(deepest, depth)
        assert deepest <= 2, "a node of the last level is a digit"
        assert 4 < len(row["text"].split()) < 12


@pytest.mark.parametrize("make", [listops, mqar])
def test_seeds_decide_everything(make):
    first, again, other = make(0, **SMALL), make(0, **SMALL), make(1, **SMALL)
    assert [split.to_dict() for split in first.values()] == [split.to_dict() for split in again.values()]
    assert first["train"].to_dict() != other["train"].to_dict()


def test_the_median_of_an_even_number_is_rounded_down():
    assert apply_operator("[MED", [1, 4]) == 2 and apply_operator("[MED", [9, 0, 4]) == 4


def test_listops_bounds_that_nothing_meets_are_refused():
    with pytest.raises(InvalidOption, match="Widen the bounds"):
        listops(**SMALL, max_depth=2, max_args=2, min_length=10, max_length=20)
    with pytest.raises(InvalidOption, match="max_args=1 must be an integer of at least 2"):
        listops(max_args=1)


def test_every_query_is_a_key_and_its_answer_the_keys_value():
    data = mqar(**SMALL, length=32, num_pairs=4, vocab_size=64)
    for row in data["train"]:
        pairs = dict(zip(row["tokens"][0:8:2], row["tokens"][1:8:2], strict=True))
        assert len(pairs) == 4
        asked = {row["tokens"][place]: answer for place, answer in enumerate(row["answers"]) if answer}
        assert asked == pairs and not any(row["answers"][:8])
        assert all(0 < int(key) < 32 <= int(value) < 64 for key, value in pairs.items())
        assert all(place % 2 == 0 for place, answer in enumerate(row["answers"]) if answer)


def test_queries_come_soon_after_the_pairs_and_uniformly_for_power_one():
    def first_share(power: float) -> float:
        _, answers = draw_mqar(np.random.default_rng(0), 4000, 64, 1, 128, power, True)
        return float((answers[:, 2] >= 0).mean())

    weights = np.arange(1, 32) ** (0.01 - 1)
    assert first_share(0.01) == pytest.approx(weights[0] / weights.sum(), abs=0.03)
    assert first_share(1.0) == pytest.approx(1 / 31, abs=0.01)


def test_without_random_filler_the_rest_is_one_token():
    data = mqar(**SMALL, length=32, num_pairs=2, vocab_size=64, random_filler=False)
    for row in data["test"]:
        rest = [token for token, answer in zip(row["tokens"][4:], row["answers"][4:], strict=True) if not answer]
        assert set(rest) == {"0"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 15}, "length=15 must be an integer of at least 16"),
        ({"length": 33}, "must be even"),
        ({"vocab_size": 10}, "vocab_size=10"),
        ({"power": 0}, "power=0"),
    ],
)
def test_mqar_refuses_sizes_that_do_not_fit(options, message):
    with pytest.raises(InvalidOption, match=message):
        mqar(**SMALL, **options)

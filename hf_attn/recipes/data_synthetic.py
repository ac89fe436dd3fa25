"""Generated tasks with published parameters: ListOps and multi-query associative recall (MQAR).

The defaults of both are the published parameters except for the number of examples (and, for ListOps, the lengths),
which are small enough for a laptop; each docstring gives the published values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_attn.errors import InvalidOption

if TYPE_CHECKING:
    import numpy as np
    from datasets import DatasetDict

SPLITS = ("train", "validation", "test")
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
NESTING = 0.25
"""Probability that a node is an operator, not a digit."""


def listops(
    split_seed: int = 0,
    train_examples: int = 4000,
    held_out_examples: int = 500,
    max_depth: int = 10,
    max_args: int = 10,
    min_length: int = 16,
    max_length: int = 64,
) -> DatasetDict:
    """ListOps expressions, such as `[MAX 2 9 [MIN 4 7 ] 0 ]`, with their value as the label.

    The Long Range Arena (Tay et al., arXiv 2011.04006; parameters read in its data/listops.py) uses the same depth,
    arguments and probabilities with lengths from 500 to 2000, 96,000 training and twice 2000 held-out examples. Its
    files write an expression with binary parentheses, which its tokenizer drops; here there are none. Not verified:
    that the examples have the same distribution as its released files, which cannot be redrawn without their seed.

    Args:
        split_seed: seed of the draws.
        train_examples, held_out_examples: size of the training split, and of each of the others.
        max_depth: levels of nodes.
        max_args: most arguments of an operator; the least is 2.
        min_length, max_length: bounds on the number of tokens, both exclusive.

    Returns:
        Splits with the columns `text` and `labels` ("0" to "9"); no expression occurs twice.
    """
    import numpy as np
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
    from tqdm.auto import tqdm

    _at_least(
        "listops", train_examples=(train_examples, 1), held_out_examples=(held_out_examples, 1), max_depth=(max_depth, 2),
        max_args=(max_args, 2), min_length=(min_length, 0), max_length=(max_length, min_length + 3),
    )  # fmt: skip
    sizes = dict(zip(SPLITS, (train_examples, held_out_examples, held_out_examples), strict=True))
    random = np.random.default_rng(split_seed)
    found: dict[str, int] = {}
    drawn = 0
    with tqdm(total=sum(sizes.values()), desc="ListOps expressions", disable=None, leave=False) as bar:
        while len(found) < sum(sizes.values()):
            drawn += 1
            if drawn > 20_000 and drawn > 20_000 * (len(found) + 1):
                raise InvalidOption(
                    f"listops: hardly any expression has min_length={min_length} < tokens < max_length={max_length} with "
                    f"max_depth={max_depth} and max_args={max_args}. Widen the bounds."
                )
            tokens: list[str] = []
            value = _expression(random, tokens, 1, max_depth, max_args, max_length)
            if value is not None and min_length < len(tokens) < max_length and (text := " ".join(tokens)) not in found:
                found[text] = value
                bar.update()
    rows = list(found.items())
    features = Features({"text": Value("string"), "labels": ClassLabel(names=[str(i) for i in range(10)])})
    splits, start = {}, 0
    for name, size in sizes.items():
        texts, labels = zip(*rows[start : start + size], strict=True)
        splits[name] = Dataset.from_dict({"text": list(texts), "labels": list(labels)}, features=features)
        start += size
    return DatasetDict(splits)


def _expression(
    random: np.random.Generator, tokens: list[str], depth: int, max_depth: int, max_args: int, max_length: int
) -> int | None:
    """Append a random expression to `tokens`; its value, or None once it is too long to be used."""
    if len(tokens) >= max_length:
        return None
    if depth == max_depth or random.random() > NESTING:
        value = int(random.integers(10))
        tokens.append(str(value))
        return value
    operator = OPERATORS[random.integers(len(OPERATORS))]
    tokens.append(operator)
    values = []
    for _ in range(random.integers(2, max_args + 1)):
        argument = _expression(random, tokens, depth + 1, max_depth, max_args, max_length)
        if argument is None:
            return None
        values.append(argument)
    tokens.append("]")
    return apply_operator(operator, values)


def apply_operator(operator: str, values: list[int]) -> int:
    """The value of a ListOps operator; the median of an even number of values is rounded down."""
    if operator == "[MED":
        middle = sorted(values)
        half = len(middle) // 2
        return middle[half] if len(middle) % 2 else (middle[half - 1] + middle[half]) // 2
    if operator == "[SM":
        return sum(values) % 10
    return min(values) if operator == "[MIN" else max(values)


def mqar(
    split_seed: int = 0,
    train_examples: int = 4000,
    held_out_examples: int = 500,
    length: int = 64,
    num_pairs: int = 4,
    vocab_size: int = 8192,
    power: float = 0.01,
    random_filler: bool = True,
) -> DatasetDict:
    """Multi-query associative recall: key-value pairs, then every key once more, each to be answered with its value.

    Arora et al., "Zoology" (arXiv 2312.04927); the parameters were read in its data/multiquery_ar.py: 8192 tokens, half
    of them keys and half values, 100,000 training and 3000 test examples, lengths 64 to 512 with 4 to 64 pairs, gaps
    before the queries from a power law with exponent `power` - 1, and random tokens where nothing is asked. Not
    verified: the scores of the paper, which need its sizes.

    Args:
        split_seed: seed of the draws.
        train_examples, held_out_examples: size of the training split, and of each of the others.
        length: tokens of an example, even.
        num_pairs: key-value pairs; `4 * num_pairs` tokens must fit.
        vocab_size: different tokens, even.
        power: of the gaps; 1 makes them uniform.
        random_filler: random tokens between the queries; otherwise one token, "0".

    Returns:
        Splits with the columns `tokens` (numbers as text) and `answers` (the value at a query, elsewhere "").
    """
    import numpy as np
    from datasets import Dataset, DatasetDict

    _at_least(
        "mqar", train_examples=(train_examples, 1), held_out_examples=(held_out_examples, 1), num_pairs=(num_pairs, 1),
        length=(length, 4 * num_pairs), vocab_size=(vocab_size, max(length, 2 * num_pairs + 2) + 1),
    )  # fmt: skip
    if length % 2 or vocab_size % 2:
        raise InvalidOption(f"mqar: length={length} and vocab_size={vocab_size} must be even.")
    if power <= 0:
        raise InvalidOption(f"mqar: power={power!r} must be above 0.")

    def split(number: int, count: int) -> Dataset:
        random = np.random.default_rng((split_seed, number))
        tokens, answers = draw_mqar(random, count, length, num_pairs, vocab_size, power, random_filler)
        words = [[str(token) for token in row] for row in tokens]
        return Dataset.from_dict(
            {"tokens": words, "answers": [["" if token < 0 else str(token) for token in row] for row in answers]}
        )

    sizes = (train_examples, held_out_examples, held_out_examples)
    return DatasetDict(
        {name: split(number, size) for number, (name, size) in enumerate(zip(SPLITS, sizes, strict=True))}
    )


def draw_mqar(
    random: np.random.Generator,
    count: int,
    length: int,
    num_pairs: int,
    vocab_size: int,
    power: float,
    random_filler: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (count, length), and the answer at every query, -1 elsewhere."""
    import numpy as np

    half, context = vocab_size // 2, 2 * num_pairs
    keys = _distinct(random, count, num_pairs, half - 1) + 1
    values = _distinct(random, count, num_pairs, vocab_size - half) + half
    tokens = (
        random.integers(vocab_size, size=(count, length)) if random_filler else np.zeros((count, length), dtype=int)
    )
    tokens[:, 0:context:2], tokens[:, 1:context:2] = keys, values
    space = (length - context) // 2
    weights = np.arange(1, space + 1) ** (power - 1.0)
    # the largest of log weight + Gumbel noise: a draw without replacement, like one after another
    noise = np.log(weights) + random.gumbel(size=(count, space))
    places = context + 2 * np.argsort(-noise, axis=1)[:, :num_pairs]
    answers = np.full((count, length), -1)
    np.put_along_axis(tokens, places, keys, axis=1)
    np.put_along_axis(answers, places, values, axis=1)
    return tokens, answers


def _distinct(random: np.random.Generator, count: int, size: int, choices: int) -> np.ndarray:
    """(count, size) numbers below `choices`, different within a row."""
    import numpy as np

    return np.stack([random.choice(choices, size=size, replace=False) for _ in range(count)])


def _at_least(name: str, **rules: tuple[Any, int]) -> None:
    for option, (value, least) in rules.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InvalidOption(f"{name}: {option}={value!r} must be an integer of at least {least}.")

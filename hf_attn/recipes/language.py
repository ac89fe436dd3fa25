"""Language modelling: text as blocks of tokens, masks that depend on nothing but seed, epoch and example, and samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from hf_attn.errors import InvalidInput, InvalidOption
from hf_attn.recipes.data import mapped
from hf_attn.recipes.objectives import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hf_attn.recipes.tasks import Setting

Example = dict[str, Any]
SHOWN = 64
"""Tokens of a sample of a causal model: a quarter is given, the rest is the model's."""


@dataclass(frozen=True)
class Sample:
    """One prediction as a reader sees it."""

    given: str
    expected: str
    predicted: str


class Redrawn(TorchDataset):
    """A split whose examples have a random part: a new one in every epoch of training, the same in every evaluation.

    The part depends on seed, epoch and index alone: neither on the number of processes or workers, nor on whether the
    run was interrupted.
    """

    def __init__(self, data: Any, draw: Callable[[Example, np.random.Generator], Example], seed: int):
        self.data, self.draw, self.seed = data, draw, seed
        # shared, so that worker processes that outlive an epoch see the next one
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def redraw(self, epoch: int) -> None:
        """Go on to the random parts of `epoch`. (Not called set_epoch: accelerate calls that in evaluations, too.)"""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Example:
        return self.draw(self.data[index], np.random.default_rng((self.seed, int(self._epoch), index)))


def redrawn(split: Any, draw: Callable[[Example, np.random.Generator], Example], seed: int) -> Any:
    """`Redrawn`; for a streamed split with one draw an example."""
    if hasattr(split, "__len__"):
        return Redrawn(split, draw, seed)
    return split.map(lambda example, index: draw(example, np.random.default_rng((seed, 0, index))), with_indices=True)


@dataclass(frozen=True)
class Pad:
    """Collator: examples of tokens as one batch, padded at the right where their lengths differ."""

    pad_token_id: int

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        batch = {}
        for key, first in examples[0].items():
            rows = [example[key] for example in examples]
            if not isinstance(first, int):
                longest = max(map(len, rows))
                rows = [[*row, *[fill.get(key, 0)] * (longest - len(row))] for row in rows]
            batch[key] = torch.tensor(rows)
        return batch


def blocks(splits: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, length: int, special: bool) -> dict[str, Any]:
    """Every split as blocks of exactly `length` tokens, its documents one after another.

    What is left after a split's last whole block (of each thousand documents, when they are many) is not used.

    Args:
        splits: with the column `text`.
        tokenizer: cuts the text.
        length: tokens of a block.
        special: surround each block with the tokenizer's special tokens, as encoders expect; otherwise the end-of-text
            token follows each document.
    """
    around = tokenizer("")["input_ids"] if special else []
    start = [token for token in around[:1] if token in (tokenizer.cls_token_id, tokenizer.bos_token_id)]
    end = around[len(start) :]
    between = [] if special or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    room = length - len(start) - len(end)
    if room < 2:
        raise InvalidOption(
            f"max_length={length!r} leaves no room for text beside {len(start) + len(end)} special tokens."
        )

    def cut(batch: dict[str, list[str]]) -> dict[str, Any]:
        # the tokenizer warns about long texts, which are cut here
        ids = tokenizer(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]
        tokens = [token for document in ids for token in (*document, *between)]
        whole = range(0, len(tokens) - room + 1, room)
        return {"input_ids": [start + tokens[i : i + room] + end for i in whole]}

    cut_splits = {name: mapped(split, cut, f"{name} tokens") for name, split in splits.items()}
    for name, split in cut_splits.items():
        if hasattr(split, "__len__") and not len(split):
            raise InvalidInput(
                f"the {name} split has less text than one block of max_length={length} tokens. Lower it."
            )
    return cut_splits


def asked(splits: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, shift: bool) -> dict[str, Any]:
    """Splits with the columns `tokens` and `answers` as input_ids and labels; an answer belongs to its token's logits."""

    def encode(batch: dict[str, list[list[str]]]) -> dict[str, Any]:
        ids = [tokenizer.convert_tokens_to_ids(row) for row in batch["tokens"]]
        labels = [
            [tokenizer.convert_tokens_to_ids(word) if word else IGNORED for word in row] for row in batch["answers"]
        ]
        return {"input_ids": ids, "labels": [[IGNORED, *row[:-1]] if shift else row for row in labels]}

    return {name: mapped(split, encode, f"{name} tokens") for name, split in splits.items()}


def masked(splits: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """Blocks whose tokens are hidden as in BERT; splits with `answers` are masked by nature."""
    tokenizer, seed = setting.processor, setting.seed
    if "answers" in (splits["train"].column_names or ()):
        return asked(splits, tokenizer, shift=False)
    if tokenizer.mask_token_id is None:
        raise InvalidInput(
            "fill-mask needs a tokenizer with a mask token. Name another tokenizer, or none to train one."
        )
    share = 0.15 if setting.data.mask_probability is None else setting.data.mask_probability
    special = frozenset(tokenizer.all_special_ids)

    def hide(example: Example, random: np.random.Generator) -> Example:
        return hide_tokens(example["input_ids"], random, share, tokenizer.mask_token_id, len(tokenizer), special)

    cut = blocks(splits, tokenizer, setting.data.max_length, special=True)
    return {name: redrawn(split, hide, seed + number) for number, (name, split) in enumerate(cut.items())}


def hide_tokens(
    ids: list[int], random: np.random.Generator, share: float, mask: int, vocab_size: int, special: frozenset[int]
) -> Example:
    """`share` of the tokens become targets: 80 % of them hidden, 10 % another token, 10 % left (Devlin et al. 2019)."""
    tokens = np.array(ids)
    usable = np.flatnonzero([token not in special for token in ids])
    # a fixed share, at least one: every example has targets
    chosen = random.choice(usable, size=max(round(share * len(usable)), 1), replace=False)
    labels = np.full(len(ids), IGNORED)
    labels[chosen] = tokens[chosen]
    fate = random.random(len(chosen))
    tokens[chosen[fate < 0.8]] = mask
    swapped = chosen[fate >= 0.9]
    tokens[swapped] = random.integers(vocab_size, size=len(swapped))
    return {"input_ids": tokens.tolist(), "labels": labels.tolist()}


def causal(splits: Mapping[str, Any], setting: Setting) -> dict[str, Any]:
    """Blocks of text with themselves as labels."""
    if "answers" in (splits["train"].column_names or ()):
        return asked(splits, setting.processor, shift=True)
    cut = blocks(splits, setting.processor, setting.data.max_length, special=False)

    def label(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        # the first token is nobody's target, so it must not be counted as one
        return {"input_ids": batch["input_ids"], "labels": [[IGNORED, *ids[1:]] for ids in batch["input_ids"]]}

    return {name: mapped(split, label, f"{name} labels") for name, split in cut.items()}


def show_answers(model: PreTrainedModel, setting: Setting, data: Any, shift: bool) -> list[Sample]:
    """What the model says at the targets of the first examples."""
    tokenizer, samples = setting.processor, []
    for index in range(min(setting.data.samples, len(data))):
        example = data[index]
        with torch.no_grad():
            ids = torch.tensor([example["input_ids"]], device=model.device)
            said = model(input_ids=ids).logits[0].argmax(-1).tolist()
        places = [place for place, label in enumerate(example["labels"]) if label != IGNORED]
        samples.append(
            Sample(
                given=tokenizer.decode(example["input_ids"]),
                expected=" | ".join(tokenizer.decode([example["labels"][place]]).strip() for place in places),
                predicted=" | ".join(tokenizer.decode([said[place - shift]]).strip() for place in places),
            )
        )
    return samples


def show_masked(model: PreTrainedModel, setting: Setting, raw: Any, data: Any) -> list[Sample]:
    """Hidden words and what the model puts there."""
    return show_answers(model, setting, data, shift=False)


def show_text(model: PreTrainedModel, setting: Setting, raw: Any, data: Any) -> list[Sample]:
    """How the model goes on after the beginning of the first blocks, each time with its most probable token."""
    if "answers" in raw.column_names:
        return show_answers(model, setting, data, shift=True)
    tokenizer, samples = setting.processor, []
    longest = getattr(model.config, "max_position_embeddings", None) or SHOWN
    for index in range(min(setting.data.samples, len(data))):
        ids = data[index]["input_ids"][: min(SHOWN, longest)]
        prompt = torch.tensor([ids[: len(ids) // 4]], device=model.device)
        with torch.no_grad():
            out = cast(Any, model).generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=len(ids) - prompt.shape[1],
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        begin = prompt.shape[1]
        samples.append(
            Sample(
                tokenizer.decode(ids[:begin]), tokenizer.decode(ids[begin:]), tokenizer.decode(out[0, begin:].tolist())
            )
        )
    return samples

"""Tokenizers: a named one, the checkpoint's, or a new one trained offline on the training split.

A new tokenizer is saved with the model and loads through AutoTokenizer. Equal texts make equal tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from hf_attn.errors import InvalidInput, InvalidOption

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
BYTES = 256
LEARN_FROM = 100_000
"""Documents a tokenizer is trained on at most, which bounds what a streamed data set is read for."""


def train_tokenizer(texts: Iterable[str], kind: str = "bpe", vocab_size: int | None = 2048) -> PreTrainedTokenizerBase:
    """A new tokenizer.

    Args:
        texts: what it is trained on.
        kind: "bpe": byte-level byte-pair encoding, which can write any text; "words": one entry for each word between
            blanks, for generated languages.
        vocab_size: most entries, with the special ones (and the 256 bytes of "bpe"); None for all words.

    Returns:
        A tokenizer with the special tokens of BERT; `[SEP]` is also the end of a text for a causal model.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = list(SPECIAL.values())
    least = len(special) + (BYTES if kind == "bpe" else 1)
    if kind == "words" and vocab_size is None:
        texts = list(texts)
        vocab_size = least + len({word for text in texts for word in text.split()})
    if not isinstance(vocab_size, int) or vocab_size < least:
        raise InvalidOption(f"vocab_size={vocab_size!r} must be at least {least}: the special tokens and the alphabet.")
    if kind == "bpe":
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    else:
        core = Tokenizer(models.WordLevel(unk_token=SPECIAL["unk"]))
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        trainer = trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    core.train_from_iterator(texts, trainer)
    first, last = SPECIAL["cls"], SPECIAL["sep"]
    core.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(first, core.token_to_id(first)), (last, core.token_to_id(last))],
    )
    names = {f"{role}_token": token for role, token in SPECIAL.items()}
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=last, bos_token=first, **names)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the Hub; one without a padding token pads with its end-of-text token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise InvalidInput(
            f"no tokenizer can be loaded from {name!r} ({error}). Set tokenizer to a folder or Hub name that has one, or leave "
            "it (and model) empty to train a new one."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.sep_token
    if tokenizer.pad_token is None:
        raise InvalidInput(
            f"the tokenizer of {name!r} has no padding and no end-of-text token. Name another tokenizer."
        )
    return tokenizer


def texts_of(split: Any) -> Iterator[str]:
    """The texts of a split, words joined by blanks, as far as a tokenizer learns from them."""
    for count, row in enumerate(split):
        if count >= LEARN_FROM:
            return
        yield row["text"] if "text" in row else " ".join([*row["tokens"], *filter(None, row.get("answers", ()))])

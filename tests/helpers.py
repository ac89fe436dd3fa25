"""Small models and calls that the tests build from the registry."""

from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertModel, BertTokenizer

import hf_attn
from hf_attn.samples import DIM, GRID, HEADS, example_inputs, example_module  # noqa: F401  # tests take the sizes from here

BERT = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}  # fmt: skip
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 12, "patch_size": 2, "encoder_stride": 2}  # fmt: skip
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "bos_token_id": 0, "eos_token_id": 98, "pad_token_id": 98}  # fmt: skip


def module_of(name: str, dtype=torch.float64, **options):
    """A small module of mechanism `name` in evaluation mode."""
    return example_module(name, options=options).to(dtype)


def call_of(module, batch: int = 2, dtype=torch.float64, **changes):
    """query, key, value and the call arguments every call of this mechanism needs; `changes` as in `example_inputs`."""
    return example_inputs(module, batch=batch, dtype=dtype, **changes)


CROSS = 2, 2, 7, 11, 4
"""B, H, N, M, D of `cross_tokens`: cross-attention of odd lengths."""


def normal(*shape, seed=4):
    """Standard normal numbers, float64, the same every time."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def cross_tokens(queries=CROSS[2], keys=CROSS[3], grad=False):
    """query, key and value; seeds 0 to 2."""
    batch, heads, dim = CROSS[0], CROSS[1], CROSS[4]
    lengths = enumerate((queries, keys, keys))
    return [normal(batch, heads, n, dim, seed=s).requires_grad_(grad) for s, n in lengths]


def cross_padding(keys=CROSS[3], seed=2):
    """Some keys of every sample hidden: never the first, always the last."""
    mask = torch.rand(CROSS[0], keys, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[:, 0], mask[:, -1] = True, False
    return mask


def qkv(queries, keys=None, batch=3, **settings):
    """query, key and value (batch, HEADS, length, DIM), float64, the same every time."""
    generator = torch.Generator().manual_seed(5)
    sizes = (queries, keys or queries, keys or queries)
    return [torch.randn(batch, HEADS, n, DIM, dtype=torch.float64, generator=generator, **settings) for n in sizes]


def agree(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def part_of(call: dict, rows: slice, tokens: slice) -> dict:
    """The call arguments of some rows and tokens."""
    if "layer_input" not in call:
        return call
    return {**call, "layer_input": call["layer_input"][rows, tokens]}


def families_of(name: str) -> list[str]:
    """The model families a mechanism can be used in, read from its record."""
    from hf_attn.capabilities import Host

    families = []
    for family, facts in (("bert", {}), ("vit", {"grid": (6, 6), "num_prefix_tokens": 1}), ("gpt2", {"causal": True})):
        mechanism = hf_attn.get_mechanism(name)
        host = Host(model=family, num_heads=4, head_dim=8, layer_idx=0, max_length=64, **facts)
        options = {**mechanism.module_class.host_defaults(host, {})}
        capabilities = mechanism.module_class.describe(mechanism.options_class.parse(**options))
        usable = (capabilities.causal or not host.causal) and (capabilities.sequence or host.grid is not None)
        if usable:
            families.append(family)
    return families


def inputs_of(model, labels: bool = False) -> dict[str, torch.Tensor]:
    """A small batch for any head of the three families, the same every time; with padding where there is a mask."""
    generator = torch.Generator().manual_seed(11)
    name, config = type(model).__name__, model.config
    if model.main_input_name == "pixel_values":
        batch = {"pixel_values": torch.rand(2, 3, config.image_size, config.image_size, generator=generator)}
        if "MaskedImage" in name:
            patches = (config.image_size // config.patch_size) ** 2
            batch["bool_masked_pos"] = torch.rand(2, patches, generator=generator) > 0.5
        elif labels:
            batch["labels"] = torch.tensor([0, 1])
        return batch
    shape = (2, 2, 10) if "MultipleChoice" in name or "DoubleHeads" in name else (2, 10)
    batch = {"input_ids": torch.randint(1, 90, shape, generator=generator)}
    if "DoubleHeads" in name:
        return batch
    batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
    batch["attention_mask"][..., 1, -3:] = 0
    if labels:
        batch["labels"] = batch["input_ids"]
    return batch


def text_checkpoint(folder: Path) -> Path:
    """A small BERT with a tokenizer in `folder`/source, and ten texts of thirty words in `folder`/data.txt."""
    words = [f"w{i}" for i in range(90)]
    source = folder / "source"
    source.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(source)
    torch.manual_seed(0)
    BertModel(BertConfig(**BERT)).save_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    texts = [" ".join(words[i] for i in torch.randint(0, 90, (30,), generator=generator)) for _ in range(10)]
    (folder / "data.txt").write_text("\n\n".join(texts))
    return source


class Largest(TorchDispatchMode):
    """Keeps the largest number of elements of any tensor that an operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out

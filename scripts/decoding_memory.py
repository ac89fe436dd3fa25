"""Bytes that the cache of an attn_gpt2 holds while it generates, by mechanism and number of tokens.

python scripts/decoding_memory.py [--output docs/benchmarks/decoding.md]

12 heads of 64 channels, 2 layers, float32, one sequence. A constant state does not grow; keys and values do.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import DynamicCache

import hf_attn
from hf_attn.errors import HfAttnError
from hf_attn.models.cache import cache_memory

TOKENS = (16, 64, 256, 1024, 2048)


def sizes(mechanism: str) -> list[int]:
    torch.manual_seed(0)
    config = hf_attn.AttnGPT2Config(
        n_embd=768, n_layer=2, n_head=12, n_positions=TOKENS[-1], vocab_size=100, attn_implementation=mechanism
    )
    model, cache, found = hf_attn.AttnGPT2Model(config).eval(), DynamicCache(config=config), []
    ids = torch.randint(0, 100, (1, TOKENS[-1]))
    with torch.no_grad():
        for tokens in TOKENS:
            # the prompt and then stretches of new tokens: what the cache holds depends on their number alone
            model(ids[:, cache.get_seq_length() : tokens], past_key_values=cache)
            found.append(cache_memory(cache))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the table there, too")
    output = parser.parse_args().output
    rows = [["mechanism", "decoding", *(f"{tokens} tokens" for tokens in TOKENS)], ["---"] * (2 + len(TOKENS))]
    for name in hf_attn.list_mechanisms():
        try:
            found = sizes(name)
        except HfAttnError:
            # not causal: it refuses GPT-2
            continue
        options = hf_attn.AttnGPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9, attn_implementation=name)
        kind = hf_attn.AttnGPT2Model(options).h[0].attn.mechanism.capabilities.decode
        rows.append([f"`{name}`", kind, *(f"{size:,}" for size in found)])
    text = "\n".join(
        ["# Memory while decoding", "", *__doc__.strip().splitlines()[0:1], "", *__doc__.strip().splitlines()[4:], "",
         "Command: `python scripts/decoding_memory.py`.", "", *("| " + " | ".join(row) + " |" for row in rows), ""]
    )  # fmt: skip
    print(text)
    if output:
        output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

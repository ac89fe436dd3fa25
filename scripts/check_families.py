"""Every model family with every mechanism it can use: does a stock checkpoint load, and is a saved model the same again?

python scripts/check_families.py [--output docs/benchmarks/families.md]

For each pair: a stock model of transformers with random weights is saved; our class loads it with the mechanism; the table
says how many parameters and buffers the mechanism added, whether all are finite, whether the stock weights arrived
unchanged, and the largest difference of the logits after save_pretrained and from_pretrained.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import transformers

import hf_attn
from hf_attn.errors import HfAttnError

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
FAMILIES = {
    "attn_bert": ("BertForMaskedLM", {**SMALL, "vocab_size": 200, "max_position_embeddings": 64}),
    "attn_vit": ("ViTForImageClassification", {**SMALL, "image_size": 32, "patch_size": 4}),
    "attn_gpt2": ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 200}),
}


def inputs(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.rand(2, 3, 32, 32, generator=generator)}
    mask = torch.ones(2, 32, dtype=torch.long)
    mask[1, 20:] = 0
    return {"input_ids": torch.randint(0, 200, (2, 32), generator=generator), "attention_mask": mask}


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs(model)).logits


def check(family: str, mechanism: str, folder: Path) -> list[str]:
    name, sizes = FAMILIES[family]
    stock_class, our_class = getattr(transformers, name), getattr(hf_attn, f"Attn{name}")
    torch.manual_seed(0)
    stock = stock_class(stock_class.config_class(**sizes))
    stock.save_pretrained(folder / "stock")
    try:
        model = our_class.from_pretrained(folder / "stock", attn_implementation=mechanism)
    except HfAttnError as error:
        return [f"`{mechanism}`", "refused: " + str(error).partition(": ")[2].partition(". ")[0], "", "", ""]
    added = {k: v for k, v in model.state_dict().items() if ".mechanism." in k}
    finite = all(torch.isfinite(v).all() for v in model.state_dict().values())
    same = all(torch.equal(v, model.state_dict()[k]) for k, v in stock.state_dict().items())
    model.save_pretrained(folder / "ours")
    again = our_class.from_pretrained(folder / "ours")
    difference = (logits(model) - logits(again)).abs().max().item()
    finite = finite and bool(torch.isfinite(logits(model)).all())
    return [f"`{mechanism}`", str(sum(v.numel() for v in added.values())), *("yes" if x else "NO" for x in (finite, same)), f"{difference:g}"]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the table there, too")
    output = parser.parse_args().output
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    header = ["mechanism", "numbers added", "all finite", "stock weights unchanged", "save/reload difference"]
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    lines = [
        "# Families and mechanisms",
        "",
        *__doc__.strip().splitlines()[4:],
        "",
        f"Command: `python scripts/check_families.py` ({versions}).",
    ]
    failed = False
    for family in FAMILIES:
        rows = []
        for mechanism in hf_attn.list_mechanisms():
            with tempfile.TemporaryDirectory() as folder:
                rows.append(check(family, mechanism, Path(folder)))
            failed |= "NO" in rows[-1] or rows[-1][4] not in ("", "0")
        lines += ["", f"## {family}", "", *("| " + " | ".join(row) + " |" for row in (header, ["---"] * 5, *rows))]
    text = "\n".join(lines) + "\n"
    print(text)
    if output:
        output.write_text(text, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

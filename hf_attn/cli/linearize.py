"""`hf-attn linearize`: give a pretrained model other attention, and train it to compute what it computed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_attn.cli.common import AsJson, app, attention_spec, hint, key_values, numbers, print_json


@app.command("linearize", no_args_is_help=True)
def linearize_command(
    model: Annotated[str, typer.Option(metavar="M", help="A pretrained model: a folder or a Hub id.")],
    to: Annotated[str, typer.Option(metavar="SPEC", help="A mechanism, or a choice by layer.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Where the model and the reports go.")],
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the mechanism; may be repeated."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="A text file, pydoc, a folder of images, or digits.",
                     show_default="pydoc for texts, digits for images"),
    ] = None,
    steps: Annotated[int, typer.Option(min=0, metavar="S", help="Steps of each stage, one batch each.")] = 200,
    transfer_steps: Annotated[
        int | None, typer.Option(min=0, help="Steps of the first stage.", show_default="--steps")
    ] = None,
    distill_steps: Annotated[
        int | None, typer.Option(min=0, help="Steps of the second stage.", show_default="--steps")
    ] = None,
    train_projections: Annotated[
        bool, typer.Option("--train-projections", help="The first stage also trains the projections to q, k and v.")
    ] = False,
    lora_rank: Annotated[int, typer.Option(min=0, help="The second stage trains LoRA updates of this rank; 0: all.")] = 0,
    transfer_rate: Annotated[float, typer.Option(help="Largest learning rate of the first stage.")] = 1e-3,
    distill_rate: Annotated[float, typer.Option(help="Largest learning rate of the second stage.")] = 1e-4,
    hidden_weight: Annotated[float, typer.Option(help="Weight of the hidden states in the second stage.")] = 1.0,
    lengths: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens of a text.")] = "64,128,256",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a batch.")] = 512,
    examples: Annotated[int, typer.Option(min=1, help="Held-out texts of each length, or images.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of parameters, draws, split and order.")] = 0,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Give a pretrained model other attention, and train it to compute what it computed before.

    Stage 1, attention transfer: each layer's mechanism learns to return what softmax returns on the same input. Only the
    mechanism's parameters are trained, with --train-projections also what makes queries, keys and values; mechanisms
    without parameters (mra, hypercube) need it.
    Stage 2, distillation: the whole model learns the original's hidden states and logits (or embeddings).

    The fidelity on held-out data is printed before, between and after. The folder gets the model, its tokenizer or image
    processor, `linearize.json`, `linearize.md` and `linearize.png`; it loads with `from_pretrained` of the Auto classes.

    **Examples**

    ```console
    hf-attn linearize --model runs/minilm --to lara --data pydoc --steps 300 --output runs/minilm-lara
    hf-attn linearize --model runs/minilm --to mra -o block_size=16 --train-projections --output runs/minilm-mra
    hf-attn linearize --model gpt2 --to "{default: rfa, 0: softmax}" --train-projections --lora-rank 8 --output runs/gpt2-rfa
    ```
    """
    spec = attention_spec(to, key_values(option or [], "--option KEY=VALUE"))
    wanted = numbers(lengths, "--lengths")
    from hf_attn.recipes.linearize import LinearizeOptions
    from hf_attn.recipes.linearize_run import linearize_checkpoint

    options = LinearizeOptions(
        transfer_steps=steps if transfer_steps is None else transfer_steps,
        distill_steps=steps if distill_steps is None else distill_steps,
        train_projections=train_projections,
        lora_rank=lora_rank,
        transfer_rate=transfer_rate,
        distill_rate=distill_rate,
        hidden_weight=hidden_weight,
        seed=seed,
    )
    result = linearize_checkpoint(model, spec, output, options, data, wanted, tokens, examples)
    if as_json:
        print_json(result.facts())
    else:
        print(result)
    hint(f"saved in {output}")

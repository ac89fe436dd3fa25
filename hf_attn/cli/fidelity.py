"""`hf-attn fidelity`: how well a model with other attention computes what the original computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hf_attn.cli.common import AsJson, app, attention_spec, hint, key_values, numbers, print_json


@app.command("fidelity", no_args_is_help=True)
def fidelity_command(
    original: Annotated[str, typer.Argument(metavar="A", help="The original: a folder or a Hub id.")],
    other: Annotated[
        str | None, typer.Argument(metavar="[B]", help="The other model.", show_default="A, with --to")
    ] = None,
    to: Annotated[
        str | None, typer.Option(metavar="SPEC", help="In place of B: A with this mechanism, or choice by layer.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the mechanism; may be repeated."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="A text file, pydoc, a folder of images, or digits.",
                     show_default="pydoc for texts, digits for images"),
    ] = None,
    lengths: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens of a text.")] = "64,128,256",
    examples: Annotated[int, typer.Option(min=1, help="Texts of each length, or images.")] = 16,
    metric: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also a task's metric: accuracy or next_token_loss.")
    ] = None,
    rows: Annotated[bool, typer.Option(help="Compare attention rows.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of parameters, draws and the choice of examples.")] = 0,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write JSON, tables and a picture there.")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Compare a model with its original: layer by layer, head by head, and by what comes out.

    The original runs in float64. Every attention module of the other model gets the layer input of the original: `error`
    is |out - exact| / |exact| over the real tokens, `row KL` and `row distance` compare the attention rows (`inf`: a key
    that has weight gets none). Hidden states, embeddings (mean pooling) and logits come from each model's own pass.

    SPEC is a mechanism, or a choice by layer such as `{default: softmax, 2-9: lara}`.

    **Examples**

    ```console
    hf-attn fidelity runs/minilm --to lara -o num_landmarks=32
    hf-attn fidelity runs/minilm runs/minilm-lara --lengths 128,512 --output runs/fidelity
    hf-attn fidelity gpt2 --to rfa --metric next_token_loss --data notes.txt --json
    ```
    """
    if (other is None) == (to is None):
        raise typer.BadParameter("give a second model, or --to SPEC for the first one with other attention.")
    if option and to is None:
        raise typer.BadParameter("--option belongs to --to.")
    spec = attention_spec(to, key_values(option or [], "--option KEY=VALUE")) if to else None
    tokens = numbers(lengths, "--lengths")
    from hf_attn.analysis.fidelity import fidelity
    from hf_attn.analysis.outputs import metric_of
    from hf_attn.models.loading import load
    from hf_attn.recipes.linearize_data import batches_for

    measured = metric_of(metric) if metric else None
    reference = load(original)
    candidate = spec or load(str(other), "auto")
    _, held_out = batches_for(reference, original, data, tokens, limit=examples, seed=seed)
    report = fidelity(reference, candidate, held_out, measured, rows, seed)
    if as_json:
        print_json(report.facts())
    else:
        print(report)
    if output:
        output.mkdir(parents=True, exist_ok=True)
        (output / "fidelity.json").write_text(json.dumps(report.facts(), indent=1) + "\n", encoding="utf-8")
        (output / "fidelity.md").write_text(f"{report}\n", encoding="utf-8")
        report.draw(output / "fidelity.png")
        hint(f"written: {output}/fidelity.json, fidelity.md, fidelity.png")

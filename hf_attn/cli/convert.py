"""`hf-attn convert`: a pretrained checkpoint with other attention, ready to publish or published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_attn.cli.common import AsJson, app, attention_spec, hint, key_values, print_json


@app.command("convert", no_args_is_help=True)
def convert_command(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder, or a model on the Hub.")],
    to: Annotated[str, typer.Option("--to", metavar="SPEC", help="A mechanism, or YAML by layer.")],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="The folder to make.")],
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the mechanism; may be repeated."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Commit, tag or branch of the source.", show_default="main")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the mechanisms' parameters and draws.")] = 0,
    linearize: Annotated[
        Path | None,
        typer.Option("--linearize", metavar="CONFIG", help="Also train the result to follow the original; a YAML file."),
    ] = None,
    fidelity: Annotated[
        bool, typer.Option("--fidelity", help="Measure how closely the result follows the original; for the card.")
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="What --fidelity and --linearize use: a text file, pydoc, a folder of images, or digits.",
                     show_default="pydoc for texts, digits for images"),
    ] = None,
    publish: Annotated[
        str | None, typer.Option("--publish", metavar="OWNER/NAME", help="Also publish the result there.")
    ] = None,
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Visibility of a new repository.", show_default="the owner's default"),
    ] = None,
    vendored: Annotated[bool, typer.Option("--vendored", help="Publish the code itself as well.")] = False,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Give a pretrained checkpoint other attention, save it with tokenizer and card, and publish it if asked to.

    The model's own weights stay as they are; the mechanisms' start where their papers let them start. Another mechanism
    computes something else: measure the result (--fidelity) before you rely on it, and train it (--linearize) where it matters.

    --linearize trains it at once, as `hf-attn linearize` does. CONFIG may hold transfer_steps, distill_steps, transfer_rate,
    distill_rate, train_projections, lora_rank, hidden_weight, data, lengths, tokens and examples; an empty file is the defaults.

    Weights are read from safetensors only, and no code of the source is run.

    **Examples**

    ```console
    hf-attn convert google-bert/bert-base-uncased --to hypercube --output runs/bert-hypercube
    hf-attn convert runs/bert --to '{default: softmax, 2-9: rfa}' --output runs/bert-rfa
    hf-attn convert runs/bert --to lara --output runs/bert-lara --linearize configs/linearize/two_stages.yaml --fidelity
    hf-attn convert runs/bert --to rfa -o num_features=128 --output runs/bert-rfa --publish someone/bert-rfa
    ```
    """
    if (private is not None or vendored) and publish is None:
        raise typer.BadParameter("--private, --public and --vendored belong to --publish OWNER/NAME.")
    if data is not None and not (fidelity or linearize):
        raise typer.BadParameter("--data belongs to --fidelity and --linearize.")
    attention = attention_spec(to, key_values(option or [], "--option KEY=VALUE"))
    from hf_attn.hub.convert import convert_checkpoint
    from hf_attn.hub.upload import Target
    from hf_attn.hub.upload import publish as upload
    from hf_attn.recipes.linearize_run import read_plan

    if publish is not None:
        Target(publish, private).check()
    plan = read_plan(linearize, seed, data)
    converted = convert_checkpoint(
        source,
        attention,
        output,
        revision=revision,
        seed=seed,
        held_out=(lambda model, folder: plan.batches(model, folder)[1]) if fidelity else None,
        linearize=plan if linearize is not None else None,
    )
    done = upload(output, publish, private=private, vendored=vendored, show=hint) if publish is not None else None
    if as_json:
        print_json({**converted.as_json(), "published": done.as_json() if done else None})
    else:
        print(converted if done is None else f"{converted}\n\n{done}")

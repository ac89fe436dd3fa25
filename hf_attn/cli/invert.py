"""`hf-attn invert`: pictures that an image classifier takes for its classes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_attn.cli.common import AsJson, app, hint, print_json


@app.command("invert", no_args_is_help=True)
def invert_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="An image classifier: a folder or a Hub id.")],
    classes: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Numbers of classes.", show_default="the first ten")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="PATH", help="Where the PNG goes.")] = Path("inversion.png"),
    steps: Annotated[int, typer.Option(help="Steps of a stage; there are seven stages.")] = 400,
    learning_rate: Annotated[float, typer.Option(help="At the beginning of a stage.")] = 0.01,
    copies: Annotated[int, typer.Option(help="Differently coloured copies of a picture.")] = 8,
    jitter: Annotated[int | None, typer.Option(help="Largest shift in pixels.", show_default="by the size")] = None,
    color_shift: Annotated[float, typer.Option(help="Bounds of the colour shift.")] = 1.0,
    way: Annotated[str, typer.Option(help="How the picture grows: center, mixed or zoom.")] = "center",
    tv_weight: Annotated[
        float, typer.Option(help="Weight of the total variation, which the method needs none of.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make pictures that an image classifier takes for its classes, to see what it has learned.

    Plug-In Inversion: a picture is optimised under shifts and colour changes, while it grows; nothing is to be tuned.
    The model's probability for its class stands above each picture.

    **Examples**

    ```console
    hf-attn invert runs/vit-ripple-digits/model --steps 50 --learning-rate 0.03 --color-shift 0.5
    hf-attn invert google/vit-base-patch16-224 --classes 1,207,985 --output classes.png
    ```
    """
    try:
        targets = [int(word) for word in classes.split(",")] if classes else None
    except ValueError as error:
        raise typer.BadParameter(f"--classes {classes!r} must be numbers, as in 0,1,2.") from error
    from transformers import AutoModelForImageClassification
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    import hf_attn  # noqa: F401  (registers its families)
    from hf_attn.analysis import inversion

    config = inversion.PlugInInversionConfig(
        steps=steps, learning_rate=learning_rate, num_copies=copies, jitter=jitter, color_shift_mean=color_shift,
        color_shift_std=color_shift, way=way, tv_weight=tv_weight, seed=seed,
    )  # fmt: skip
    loaded = AutoModelForImageClassification.from_pretrained(model)
    inverter = inversion.PlugInInverter(loaded, AutoImageProcessor.from_pretrained(model), config)
    found = inverter.invert(list(range(min(10, loaded.config.num_labels))) if targets is None else targets)
    labels = loaded.config.id2label
    inversion.draw(found, output, [labels[i] for i in range(loaded.config.num_labels)])
    probability = found.logits.softmax(dim=-1)
    rows = [
        {
            "class": target,
            "label": labels[target],
            "probability": probability[i, target].item(),
            "recognised": bool(found.logits[i].argmax() == target),
            "loss": found.losses[-1, i].item(),
        }
        for i, target in enumerate(found.targets)
    ]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            print(f"{row['class']:>5}  {row['label']:<24}{row['probability']:.3f}")
    hint(f"picture: {output}")

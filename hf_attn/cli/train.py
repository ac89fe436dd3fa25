"""`hf-attn train`: train what a configuration describes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_attn.cli.common import app, key_values


@app.command(
    "train",
    no_args_is_help=True,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="[--KEY=VALUE ...]",
)
def train_command(
    ctx: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file, as in configs/.")],
) -> None:
    """Train what a configuration describes, check that it reloads, and pack it for the Hub.

    Keys of the file are the fields of ModelArguments and DataArguments (hf_attn.recipes.arguments) and of
    transformers.TrainingArguments. Any of them can be overridden as `--key=value`; dots reach into dicts.
    What is wrong is refused before any work is done.

    **Examples**

    ```console
    hf-attn train configs/vit_ripple_digits.yaml
    hf-attn train configs/vit_ripple_digits.yaml --seed=1 --output_dir=runs/seed-1
    hf-attn train configs/vit_ripple_digits.yaml --attn_implementation=softmax --config.hidden_size=64
    ```

    On several processes: `accelerate launch -m hf_attn.cli train CONFIG`.
    """
    overrides = key_values(ctx.args, "--KEY=VALUE")
    from hf_attn.recipes.train import train

    result = train(config, overrides)
    if result is not None:
        print(result)

"""The command `hf-attn` and what its sub-commands share.

Results go to stdout, hints and errors to stderr. Exit codes: 0, 1 for an error or a failed check, 2 for wrong usage.
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_attn.errors import HfAttnError, InvalidOption


class Commands(TyperGroup):
    """The commands, in the order they are defined; an error of hf_attn becomes one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HfAttnError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=Commands,
    help="""Published attention mechanisms for Hugging Face models.

    See what there is (list), read about one (show), train a model with it (train), give it to a pretrained
    model (linearize, fidelity), check that this machine computes it right (doctor) and how fast (bench).

    **A first session**

    ```console
    hf-attn list
    hf-attn show ripple
    hf-attn doctor
    hf-attn train configs/vit_ripple_digits.yaml --num_train_epochs=5
    ```

    Results go to stdout, hints and errors to stderr. Exit codes: 0, 1 for an error, 2 for wrong usage.
    """,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def key_values(words: list[str], form: str) -> dict[str, Any]:
    """KEY=VALUE words as a dict, values read as YAML; anything else is wrong usage."""
    from hf_attn.recipes.arguments import parse_overrides

    for word in words:
        if "=" not in word:
            raise typer.BadParameter(f"{word!r} must look like {form}.")
    try:
        return parse_overrides(words)
    except InvalidOption as error:
        raise typer.BadParameter(str(error)) from error


def attention_spec(text: str, options: dict[str, Any]) -> dict[str, Any]:
    """The choice of attention in `text`: a mechanism, or YAML by layer; `options` belong to its default mechanism."""
    import yaml

    import hf_attn
    from hf_attn.models.spec import canonical

    # mechanisms register when the first public name is asked for
    hf_attn.list_mechanisms()
    try:
        return canonical(yaml.safe_load(text), options)
    except yaml.YAMLError as error:
        raise typer.BadParameter(
            f"--to {text!r} must be a mechanism, or like '{{default: softmax, 2-9: lara}}'."
        ) from error


def numbers(text: str, flag: str) -> list[int]:
    """The positive numbers in `text`, N,N,...; anything else is wrong usage."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"{flag} {text!r} must be numbers, as in 64,128.")
    return [int(word) for word in words]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def hint(text: str) -> None:
    print(text, file=sys.stderr)

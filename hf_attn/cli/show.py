"""`hf-attn show`: one mechanism explained, with its picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_attn.cli.common import AsJson, app, hint, key_values, print_json
from hf_attn.errors import InvalidInput, Unsupported


@app.command("show", no_args_is_help=True)
def show_command(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A mechanism; `hf-attn list` prints them.")],
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="An option of the mechanism; may be repeated."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="PATH", help="Where the PNG goes.", show_default="NAME.png")
    ] = None,
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Draw nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Explain one mechanism, and draw what it attends to.

    Prints title, paper, equation, every option with its default and meaning, and what the mechanism can do. Options
    change what it can do: give them with `--option`, on top of the mechanism's example options.

    The picture shows the attention weights, mean over samples and heads, on the same smooth random input for every
    mechanism: queries down, keys across; on a grid also the weights of one query.

    **Examples**

    ```console
    hf-attn show ripple
    hf-attn show ripple --option allow_1d=true --option ripple_kernel=softmax
    hf-attn show rfa --picture pictures/rfa.png
    hf-attn show rfa --no-picture --json
    ```
    """
    if picture and no_picture:
        raise typer.BadParameter("--picture and --no-picture exclude each other.")
    given = key_values(option or [], "--option KEY=VALUE")
    from hf_attn import console, tables
    from hf_attn.analysis import attention_maps

    facts = tables.facts(name, given)
    drawn: Path | None = None
    if not no_picture:
        try:
            shown = attention_maps.patterns(name, given)
        except (InvalidInput, Unsupported) as error:
            hint(f"no picture: {error}")
        else:
            drawn = picture or Path(f"{name}.png")
            attention_maps.draw(shown, drawn)
    if as_json:
        print_json({**facts, "picture": str(drawn) if drawn else None})
    else:
        console.print_facts(facts)
    if drawn:
        hint(f"picture: {drawn}")

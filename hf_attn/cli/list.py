"""`hf-attn list`: what every mechanism can do."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_attn.cli.common import AsJson, app, print_json


@app.command("list")
def list_command(
    as_json: AsJson = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of README.md.")] = False,
) -> None:
    """Print what every mechanism can do.

    One row a mechanism, made from the records in the code. The tests check every tick and every dash: what has a tick
    works, what has a dash is refused or has no effect. A row holds for the mechanism's example options; `show` tells
    what others change.

    - `grid`: rows and columns of tokens are used, or needed in every call
    - `CLS/prefix`: tokens before the grid have a place of their own; `plain`: they are ordinary tokens
    - `decoding`: with the full `cache` of keys and values, or with a smaller `state` (`growing`: with the length)
    - `learned`: has parameters that a stock checkpoint lacks
    - `pays from`: tokens from which it is faster than torch's own attention

    **Examples**

    ```console
    hf-attn list
    hf-attn list --json | jq -r '.[] | select(.capabilities.causal) | .name'
    hf-attn list --markdown
    ```
    """
    if as_json and markdown:
        raise typer.BadParameter("--json and --markdown exclude each other.")
    from hf_attn import console, tables

    if markdown:
        print(tables.readme_table())
    elif as_json:
        print_json([tables.facts(name) for name in tables.list_mechanisms()])
    else:
        console.print_capabilities()

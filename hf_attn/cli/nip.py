"""`hf-attn nip`: rate who attends to whom."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_attn.cli.common import AsJson, app, hint, key_values, print_json


@app.command("nip")
def nip_command(
    pattern: Annotated[
        str, typer.Option(metavar="NAME", help="A mechanism, or a graph such as bigbird; `hypercube` is both.")
    ] = "hypercube",
    length: Annotated[int, typer.Option(metavar="N", help="Tokens.")] = 512,
    causal: Annotated[bool, typer.Option("--causal", help="The pattern in causal order.")] = False,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="KEY=VALUE", help="An argument of the pattern; may be repeated."),
    ] = None,
    picture: Annotated[Path | None, typer.Option("--picture", metavar="PATH", help="Also draw the patterns.")] = None,
    as_json: AsJson = False,
) -> None:
    """Rate who attends to whom by its Normalized Information Payload, beside well-known patterns of equal degree.

    The score sets what reaches a token against what it costs: more is better, and `relative` is 1 for the complete
    graph. The table compares the pattern with the hypercube, BigBird, Longformer, a random graph, the ring and the
    complete graph over the same number of tokens.

    **Examples**

    ```console
    hf-attn nip --pattern hypercube --length 512
    hf-attn nip --pattern bigbird --length 256 -o w=3 -o g=1 -o r=3 --picture bigbird.png
    hf-attn nip --pattern eva --length 64 -o window_size=8 -o chunk_size=4 --json
    ```
    """
    given = key_values(option or [], "--option KEY=VALUE")
    from hf_attn.analysis.nip import compare, draw, score, table

    asked = score(pattern, length, causal, **given)
    others = [row for row in compare(length) if row.pattern != pattern or given or causal]
    rows = [asked, *others]
    if as_json:
        print_json([row.facts() for row in rows])
    else:
        print(table(rows))
    if picture:
        draw(rows, picture)
        hint(f"picture: {picture}")

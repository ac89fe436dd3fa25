"""`hf-attn bench`: time mechanisms, gated by correctness."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_attn.cli.common import app


@app.command("bench")
def bench_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME[:KEY=VALUE,...]]...",
            help="Mechanisms, gau, flash_gau, or other packages.",
            show_default="all",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="Tokens.", show_default="512,1024,2048,4096; a model: 128; resnet: 224 pixels"
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Whole models: bert, gpt2, vit, resnet, a folder or a Hub id.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers of a model built from sizes.")] = 4,
    batch: Annotated[int | None, typer.Option(help="Samples.", show_default="1; a model: 4")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads.", show_default="4; a model: 12")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Head dimension.", show_default="64")] = None,
    dtype: Annotated[str, typer.Option(help="float64, float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    causal: Annotated[
        bool | None, typer.Option("--causal/--bidirectional", help="One mode only.", show_default="every defined mode")
    ] = None,
    backward: Annotated[bool, typer.Option(help="Also forward and backward together.")] = True,
    memory: Annotated[bool, typer.Option(help="Also peak memory.")] = True,
    total: Annotated[float, typer.Option(help="Seconds for everything; the longest lengths are left out.")] = 540.0,
    seed: Annotated[int, typer.Option(help="Seed of inputs and parameters.")] = 0,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Write CSV, Markdown and PNG there.")] = None,
) -> None:
    """Time mechanisms on this machine, against torch's own attention. What computes wrong numbers is not timed.

    Every row is verified first, in the same process: the efficient form against the definition, in float64 and in the
    precision that is timed, gradients included. Baseline and candidate then run in turns; the table shows medians and
    the ratio with its quartiles: below 1 is faster than exact attention.

    **Examples**

    ```console
    hf-attn bench rfa ripple --lengths 1024,4096
    hf-attn bench rfa:num_features=128 --causal --output runs/bench
    hf-attn bench softmax rfa --model bert --lengths 128,512
    hf-attn bench stored --model runs/my-checkpoint
    hf-attn bench aa_resnet:depth=50 --model resnet --batch 4
    ```
    """
    try:
        tokens = [int(word) for word in lengths.split(",")] if lengths else None
    except ValueError as error:
        raise typer.BadParameter(f"--lengths {lengths!r} must be numbers, as in 1024,2048.") from error
    from hf_attn import bench

    bench.run(
        names or None, tokens, model=model, layers=layers, batch=batch, heads=heads, head_dim=head_dim, dtype=dtype,
        device=device, causal=causal, backward=backward, memory=memory, total=total, seed=seed, output=output,
    )  # fmt: skip

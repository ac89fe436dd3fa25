"""`hf-attn spectrum`: eigenvalues and eigenfunctions of a model's attention, or of its tangent kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_attn.cli.common import AsJson, app, hint, print_json


@app.command("spectrum", no_args_is_help=True)
def spectrum_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder or a Hub id.")],
    kernel: Annotated[
        str, typer.Option(metavar="NAME", help="key, query or gram of an attention head, or ntk of an image classifier.")
    ] = "key",
    layer: Annotated[int, typer.Option(min=0, help="Attention layer, from 0.")] = 0,
    head: Annotated[int, typer.Option(min=0, help="Head, from 0.")] = 0,
    label: Annotated[int | None, typer.Option(help="ntk: the logit.", show_default="the sum of all")] = None,
    probes: Annotated[int, typer.Option(min=1, help="ntk: random projections of the Jacobian.")] = 256,
    data: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="A text file, pydoc, a folder of images, or digits.",
                     show_default="pydoc for texts, digits for images"),
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Tokens of a text.")] = 64,
    examples: Annotated[int, typer.Option(min=1, help="Texts or images; gram takes one.")] = 8,
    functions: Annotated[int, typer.Option(min=1, help="Eigenfunctions.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training them.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of all that is random.")] = 0,
    exact: Annotated[bool, typer.Option(help="Compare with the matrix's own, at N^3.")] = True,
    output: Annotated[Path, typer.Option(metavar="PATH", help="Where the PNG goes.")] = Path("spectrum.png"),
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Learn the leading eigenfunctions of a kernel of the model on given inputs, by NeuralEF.

    `key` and `query` are exp(k . k' / sqrt(D)) between a head's keys, or queries; `gram` is A^T A of one attention map;
    `ntk` is the neural tangent kernel. A function counts only where it is marked as converged.

    **Examples**

    ```console
    hf-attn spectrum runs/minilm --layer 2 --head 3
    hf-attn spectrum runs/vit-ripple-digits/model --kernel gram --examples 1 --functions 3
    hf-attn spectrum runs/vit-ripple-digits/model --kernel ntk --examples 64 --label 3
    ```
    """
    kernels = ("key", "query", "gram", "ntk")
    if kernel not in kernels:
        raise typer.BadParameter(f"--kernel {kernel!r} must be one of {', '.join(kernels)}.")
    if kernel != "ntk" and label is not None:
        raise typer.BadParameter("--label belongs to --kernel ntk.")
    from hf_attn.analysis.neural_ef_fit import draw, exact_spectrum, fit
    from hf_attn.analysis.neural_ef_kernels import attention_kernel, ntk_samples
    from hf_attn.errors import Unsupported
    from hf_attn.models.loading import load
    from hf_attn.recipes.linearize_data import batches_for

    loaded = load(model, "auto").eval()
    images = loaded.main_input_name == "pixel_values"
    _, held_out = batches_for(loaded, model, data, [length], examples * max(length, 64), examples, seed)
    if kernel == "ntk":
        if not images:
            remedy = "Choose an image classifier, or --kernel key"
            raise Unsupported("--kernel ntk", "tokens are no points that a function can be learned of", remedy)
        pixels = held_out[0]["pixel_values"]
        samples = ntk_samples(loaded, pixels, output=label, probes=probes, seed=seed)
        given: dict[str, Any] = {"inputs": pixels.flatten(1), "kernel_samples": samples}
    else:
        found_kernel = attention_kernel(loaded, held_out[0], layer=layer, head=head, which=kernel)
        given = {"inputs": found_kernel.inputs, "kernel": found_kernel.kernel}
    found = fit(**given, functions=functions, steps=steps, seed=seed)
    reference = exact_spectrum(**given, functions=functions) if exact else None
    draw(found, output, reference, f"{Path(model).name}, {kernel}")
    if as_json:
        columns = {"eigenvalue": found.eigenvalues, "off_diagonal": found.off_diagonal, "residual": found.residual}
        columns |= {"converged": found.converged}
        if reference is not None:
            columns |= {"exact": reference.eigenvalues, "cosine": found.cosines(reference)}
        print_json([{"function": j + 1} | {n: c[j].item() for n, c in columns.items()} for j in range(functions)])
    else:
        print(found.table(reference))
    hint(f"picture: {output}")

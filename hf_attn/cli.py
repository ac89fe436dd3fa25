"""The command `hf-attn`. One function a command, whose docstring is its help page; what is heavy is imported inside it.

Results go to stdout, hints and errors to stderr. Exit codes: 0, 1 for an error or a failed check, 2 for wrong usage.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from hf_attn import __version__
from hf_attn.errors import HfAttnError, InvalidInput, InvalidOption, Unsupported


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

    See what there is (list), read about one (show), train a model with it (train), check that this machine computes
    it right (doctor) and how fast (bench).

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
        _print_json([tables.facts(name) for name in tables.list_mechanisms()])
    else:
        console.print_capabilities()


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
    given = _key_values(option or [], "--option KEY=VALUE")
    from hf_attn import console, tables
    from hf_attn.analysis import attention_maps

    facts = tables.facts(name, given)
    drawn: Path | None = None
    if not no_picture:
        try:
            shown = attention_maps.patterns(name, given)
        except (InvalidInput, Unsupported) as error:
            _hint(f"no picture: {error}")
        else:
            drawn = picture or Path(f"{name}.png")
            attention_maps.draw(shown, drawn)
    if as_json:
        _print_json({**facts, "picture": str(drawn) if drawn else None})
    else:
        console.print_facts(facts)
    if drawn:
        _hint(f"picture: {drawn}")


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
    overrides = _key_values(ctx.args, "--KEY=VALUE")
    from hf_attn.recipes.train import train

    result = train(config, overrides)
    if result is not None:
        print(result)


@app.command("doctor")
def doctor_command(
    device: Annotated[
        str | None,
        typer.Option("--device", metavar="DEVICE", help="Check this device only, such as cpu, cuda or cuda:1.",
                     show_default="the CPU, and the accelerator where there is one"),
    ] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Check this installation: versions, devices, kernels, and every mechanism.

    Every mechanism runs on tiny inputs, forward and backward, in each mode it defines. Its efficient form on the device
    is compared with its definition on the CPU in float64. An error is the largest difference over the largest number of
    the reference; the table shows the worst of all modes, of the result and of the gradients.

    Exit code 0 if everything passes, 1 otherwise.

    **Examples**

    ```console
    hf-attn doctor
    hf-attn doctor --device cuda:1
    hf-attn doctor --json > report.json
    ```
    """
    from hf_attn import console, doctor

    with console.make(stderr=True).status("checking") as status:
        report = doctor.examine(device, lambda name: status.update(f"checking {name}"))
    if as_json:
        _print_json(report.as_json())
    else:
        console.print_report(report)
    for failure in report.failures:
        print(f"failed: {failure}", file=sys.stderr)
    raise typer.Exit(1 if report.failures else 0)


@app.command("bench")
def bench_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME[:KEY=VALUE,...]]...", help="Mechanisms or other packages.", show_default="all"),
    ] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Tokens.", show_default="512,1024,2048,4096; a model: 128")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Whole models: bert, gpt2, vit, a folder or a Hub id.")
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
    given = _key_values(option or [], "--option KEY=VALUE")
    from hf_attn.analysis.nip import compare, draw, score, table

    asked = score(pattern, length, causal, **given)
    others = [row for row in compare(length) if row.pattern != pattern or given or causal]
    rows = [asked, *others]
    if as_json:
        _print_json([row.facts() for row in rows])
    else:
        print(table(rows))
    if picture:
        draw(rows, picture)
        _hint(f"picture: {picture}")


@app.command("version")
def version_command() -> None:
    """Print the version of hf_attn. The versions of everything it uses: `hf-attn doctor`."""
    print(f"hf_attn {__version__}")


def _key_values(words: list[str], form: str) -> dict[str, Any]:
    """KEY=VALUE words as a dict, values read as YAML; anything else is wrong usage."""
    from hf_attn.recipes.arguments import parse_overrides

    for word in words:
        if "=" not in word:
            raise typer.BadParameter(f"{word!r} must look like {form}.")
    try:
        return parse_overrides(words)
    except InvalidOption as error:
        raise typer.BadParameter(str(error)) from error


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def _hint(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    app(prog_name="hf-attn")

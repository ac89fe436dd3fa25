"""`hf-attn kernels`: the Triton kernels as a repository of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_attn.cli.common import AsJson, app, hint, print_json

kernels_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", add_completion=False)


@kernels_app.callback()
def kernels_command() -> None:
    """The Triton kernels of hf_attn, for use without it. Which of them run here: `hf-attn doctor`.

    **Examples**

    ```console
    hf-attn kernels export build/kernels
    ```
    """


@kernels_app.command("export", no_args_is_help=True)
def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An empty or new folder.")],
    as_json: AsJson = False,
) -> None:
    """Write the Triton kernels as a Hub kernel repository, which the package `kernels` loads.

    One build for all machines: Python files that Triton compiles where they run. Nothing is uploaded.

    **Examples**

    ```console
    hf-attn kernels export build/kernels
    hf-attn kernels export build/kernels --json
    ```
    """
    from hf_attn.hub.kernel_repo import export_kernels

    done = export_kernels(folder)
    if as_json:
        print_json({"folder": str(done.folder), "id": done.id, "functions": done.functions, "files": done.files})
    else:
        for name in done.functions:
            print(name)
    hint(f"{len(done.files)} files in {done.folder}; the build is {done.id}")


app.add_typer(kernels_app, name="kernels")

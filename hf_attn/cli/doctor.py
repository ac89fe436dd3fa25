"""`hf-attn doctor`: check this installation."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from hf_attn.cli.common import AsJson, app, print_json


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

    Kernels are active where automatic choice takes them; with HF_ATTN_KERNELS=triton our Triton kernels are too. On a GPU
    every Triton kernel runs in a mechanism that is made for it, active or not.

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
        print_json(report.as_json())
    else:
        console.print_report(report)
    for failure in report.failures:
        print(f"failed: {failure}", file=sys.stderr)
    raise typer.Exit(1 if report.failures else 0)

"""`hf-attn publish`: upload a checkpoint, checked before and verified after."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_attn.cli.common import AsJson, app, hint, print_json


@app.command("publish", no_args_is_help=True)
def publish_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A saved model, or a folder that was packed.")],
    repo_id: Annotated[str, typer.Option("--repo-id", metavar="OWNER/NAME", help="The repository.")],
    private: Annotated[
        bool | None,
        typer.Option("--private/--public", help="Visibility of a new repository.", show_default="the owner's default"),
    ] = None,
    revision: Annotated[str, typer.Option(metavar="BRANCH", help="Branch; made where it does not exist.")] = "main",
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    tag: Annotated[str | None, typer.Option(metavar="NAME", help="Also tag the commit.")] = None,
    message: Annotated[str, typer.Option(metavar="TEXT", help="Title of the commit.")] = "Publish with hf_attn",
    vendored: Annotated[
        bool, typer.Option("--vendored", help="Add the code itself, so that hf_attn need not be installed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, show the plan, and send nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a saved model, upload it to the Hub in one commit, and verify what arrived.

    Refuses pickles, damaged weights, an index that does not fit its shards, a config that does not load, a model that
    answers its stored probe with other numbers, and anything that looks like an access token or a key, with file and
    line. Stale shards of an earlier version are deleted in the same commit.

    Safe to run again: an interrupted upload is continued, and one that is there already changes nothing. A commit that
    somebody else made meanwhile is never overwritten.

    The token comes from HF_TOKEN or `hf auth login`; there is no option for it, so that it cannot end up in a log.

    **Examples**

    ```console
    hf-attn publish runs/model --repo-id someone/bert-rfa --dry-run
    hf-attn publish runs/model --repo-id someone/bert-rfa --private --tag v1
    hf-attn publish runs/model --repo-id someone/bert-rfa --create-pr --json
    ```
    """
    from hf_attn.hub import publish

    result = publish(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        tag=tag,
        message=message,
        vendored=vendored,
        dry_run=dry_run,
        show=hint,
    )
    if as_json:
        print_json(result.as_json())
    else:
        print(result)

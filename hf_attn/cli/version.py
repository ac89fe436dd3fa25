"""`hf-attn version`: the version."""

from __future__ import annotations

from hf_attn import __version__
from hf_attn.cli.common import app


@app.command("version")
def version_command() -> None:
    """Print the version of hf_attn. The versions of everything it uses: `hf-attn doctor`."""
    print(f"hf_attn {__version__}")

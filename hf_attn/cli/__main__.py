"""`python -m hf_attn.cli`: the command `hf-attn` with the Python that is active."""

from hf_attn.cli import app

if __name__ == "__main__":
    app(prog_name="hf-attn")

"""Training methods on transformers' Trainer; `scripts/` and the command line call them."""

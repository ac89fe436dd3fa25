"""Looking into mechanisms and models."""

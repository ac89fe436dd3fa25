"""Publishing: model cards, and folders that are safe to upload."""

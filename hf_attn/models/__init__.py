"""Model families, and the conversion of any loaded model."""

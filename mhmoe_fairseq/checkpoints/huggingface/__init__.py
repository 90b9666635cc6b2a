"""Language models as folders that ``transformers`` opens without this package, and back."""

"""Parts of ``scripts/mutate.py``; not installed with the package."""

"""Layer weights of the official repository's checkpoints."""

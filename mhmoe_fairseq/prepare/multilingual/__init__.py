"""One prepared folder for many languages: cleaning, the split by key, one vocabulary, aligned held-out text."""

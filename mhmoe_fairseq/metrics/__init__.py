"""Measures of a model's answers: captions, recall."""

"""Fitting visual tokenizers to training images."""

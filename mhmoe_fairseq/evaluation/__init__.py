"""Trained models in use: text generation."""

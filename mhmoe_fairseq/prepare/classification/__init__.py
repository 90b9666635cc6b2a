"""Labelled sentences, binarised."""

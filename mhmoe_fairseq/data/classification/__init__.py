"""Labelled sentences and pairs, such as XNLI's, for fine-tuning."""

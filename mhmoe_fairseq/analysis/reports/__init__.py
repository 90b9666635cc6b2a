"""Tables and plots of trained models."""

"""The experts' kernels for a CPU."""

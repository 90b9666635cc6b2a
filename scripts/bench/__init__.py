"""Parts shared by the benchmark scripts; not installed with the package."""

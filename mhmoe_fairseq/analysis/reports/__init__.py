"""Reports on trained models, made of their records and training logs."""

"""Plans before training, reports and measurements after it."""

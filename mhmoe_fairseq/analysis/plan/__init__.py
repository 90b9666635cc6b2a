"""What a training needs, counted before it starts: parameters, FLOPs, memory, traffic."""

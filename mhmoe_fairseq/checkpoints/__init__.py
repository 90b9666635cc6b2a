"""Files of weights: open, read, write, inspect, convert, average, import."""

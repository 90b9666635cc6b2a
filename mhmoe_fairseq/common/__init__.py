"""What every layer may use: errors, files, the terminal, numbers and their ranges; imports no torch."""

"""The ``mhmoe`` command: one module for each sub-command."""

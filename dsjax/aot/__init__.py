"""The real train step, compiled ahead of time for hardware that is not here."""

"""Scores of a checkpoint on held-out data, and the report over the stages of a run. Imports the package, never the reverse."""

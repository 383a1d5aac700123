"""Metrics as numbers a segment that add up, and a function of their sums: grouping and resampling come for free."""

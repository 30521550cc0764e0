"""Files -> batches: one file for each kind of data."""

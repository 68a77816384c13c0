"""The report of an evaluation: one HTML page that opens from disk and needs nothing else."""

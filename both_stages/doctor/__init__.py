"""What a machine or a cluster lacks, found in seconds instead of by jobs that fail."""

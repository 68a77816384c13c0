"""Sets on s3://, gs://, hf:// ... : connection, cache, upload."""

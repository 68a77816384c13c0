"""One-off conversions of other projects' files; their output is shipped."""

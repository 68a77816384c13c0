"""The embedded teacher: its data, its training, its figures."""

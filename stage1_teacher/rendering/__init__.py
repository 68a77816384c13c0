"""Pixels of text: what an input looks like before the teacher encodes it."""

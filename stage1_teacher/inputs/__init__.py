"""Inputs as people write them: annotation and prompt files, captions, fonts."""

"""Measuring how well text was drawn: what is asked for, who draws, who reads, and what the scores say."""

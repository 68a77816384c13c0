"""Measuring how well text came out: what is asked for, who samples, who reads, and what the scores say."""

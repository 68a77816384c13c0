"""Looking at a set: verify, status, inspect, finalize, contact sheet."""

"""Stage one: runs the teacher offline and records what it did."""

"""What needs both stages at once: sampling with either, the composition of an evaluation, the demo."""

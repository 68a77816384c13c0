"""What one record holds, and its bytes."""

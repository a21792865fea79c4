"""What can be timed: one small module each, found by name."""

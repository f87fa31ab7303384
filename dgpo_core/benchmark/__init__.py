"""What only measures the engine."""

"""What a network predicts, and the deterministic solvers that draw with it."""

"""Taste: a reward made of somebody's answers, a small model on features that stay as they are."""

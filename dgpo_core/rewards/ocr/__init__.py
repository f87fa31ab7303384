"""Texts in pictures, and whether they are those that the prompt asks for."""

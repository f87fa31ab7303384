"""DGPO: reinforcement learning of diffusion models by Direct Group Preference Optimization (arXiv 2510.08425).

Importing this package imports nothing heavy; the rooms are its modules.
"""

__version__ = "0.1.0"

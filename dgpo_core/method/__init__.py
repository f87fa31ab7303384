"""The paper (arXiv 2510.08425): loss, advantage, update, roll-out and the trainer."""

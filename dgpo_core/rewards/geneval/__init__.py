"""GenEval: objects, counts, colours and positions (arXiv 2310.11513)."""

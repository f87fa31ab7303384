"""Training on a ComfyUI MODEL."""

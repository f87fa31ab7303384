"""LoRA files of all trainers, read alike and written in diffusers' format."""

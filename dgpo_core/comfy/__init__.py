"""ComfyUI's formats, read without ComfyUI: workflows, and the prompts in its pictures."""

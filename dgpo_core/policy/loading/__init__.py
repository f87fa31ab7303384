"""From a file or folder to a diffusers pipeline."""

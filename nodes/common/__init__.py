"""What every node uses: ComfyUI itself, widgets, and the values on edges."""

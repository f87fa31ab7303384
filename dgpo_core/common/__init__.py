"""What every room uses: errors, seeds, files, processes, prompts, groups and pictures."""

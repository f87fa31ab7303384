"""Settings: their fields, files, presets and checks."""

"""The embedded model: a small SD3 pipeline that draws a world of coloured shapes, and the command that made it."""

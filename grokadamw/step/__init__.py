"""One step: its stages, in order, and what they hand on."""

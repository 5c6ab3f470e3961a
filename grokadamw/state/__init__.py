"""The state of a parameter: create, keep, load and measure it."""

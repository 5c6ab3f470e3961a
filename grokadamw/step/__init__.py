"""The stages of one step, in order, and the values that they pass on."""

"""The state of a parameter: how it is made, kept, loaded and measured."""

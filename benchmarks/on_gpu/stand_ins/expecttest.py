"""Stands in for expecttest where it is not installed: torch.testing imports it, and our tests need no more of it."""

from unittest import TestCase

__all__ = ["TestCase"]

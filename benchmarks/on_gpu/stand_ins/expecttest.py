"""A stand-in for expecttest where it is missing: torch.testing imports it, and our tests need no more of it."""

from unittest import TestCase

__all__ = ["TestCase"]

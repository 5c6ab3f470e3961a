"""GrokAdamW: AdamW that amplifies slow gradients, for models that memorise long before they generalise."""

from . import signals
from .grokadamw import GrokAdamW

__all__ = ["GrokAdamW", "signals"]
__version__ = "0.2.0"

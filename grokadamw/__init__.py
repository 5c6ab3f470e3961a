"""GrokAdamW: AdamW that amplifies slow gradients, for models that memorise long before they generalise."""

from . import signals
from .accumulation import Accumulate
from .grokadamw import GrokAdamW
from .grokfast import Grokfast, GrokfastMA

__all__ = ["Accumulate", "GrokAdamW", "Grokfast", "GrokfastMA", "signals"]
__version__ = "0.2.0"

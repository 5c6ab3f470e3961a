"""GrokAdamW: AdamW that amplifies slow gradients, for models that memorise long before they generalise."""

from . import signals
from .accumulation import Accumulate
from .grokadamw import GrokAdamW
from .grokfast import Grokfast, GrokfastMA
from .groups import decay_groups
from .monitor import Monitor

__all__ = ["Accumulate", "GrokAdamW", "Grokfast", "GrokfastMA", "Monitor", "decay_groups", "signals"]
__version__ = "0.2.0"

"""GrokAdamW: AdamW that amplifies slow gradients, for models that memorise long before they generalise."""

from . import signals
from .accumulation import Accumulate
from .grokadamw import GrokAdamW
from .grokfast import Grokfast, GrokfastMA
from .groups import decay_groups
from .in_backward import step_in_backward
from .monitor import Monitor
from .precision import full_precision_state_dict, load_full_precision_state_dict

__all__ = ["Accumulate", "GrokAdamW", "Grokfast", "GrokfastMA", "Monitor", "decay_groups", "step_in_backward"]
__all__ += ["full_precision_state_dict", "load_full_precision_state_dict", "signals"]
__version__ = "0.2.0"

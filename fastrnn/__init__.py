"""fastrnn: recurrent networks for PyTorch that run at the speed of the hardware.

``fastrnn.LSTM``, ``GRU``, ``RNN`` and their cells stand in for `torch.nn`'s; `sample` is one exact, reproducible draw;
`LanguageModel` trains, generates and scores sequences. Importing compiles nothing and needs neither a GPU nor the
extension; what each call runs on, and why, `explain` tells.
"""

__version__ = "0.1.0"

from .backends import BackendRefusal as BackendRefusal
from .backends import backend as backend
from .backends import explain as explain

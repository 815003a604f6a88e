"""fastrnn: recurrent networks for PyTorch that run at the speed of the hardware."""

__version__ = "0.1.0"

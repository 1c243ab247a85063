"""The operations of :mod:`tightfit.kernels.pages` in torch."""

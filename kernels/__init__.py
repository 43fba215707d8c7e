"""Device code and, beside it, the plain PyTorch definition of every op.

Installed and imported as ``vmae_fast.kernels``. One file an op; nothing here checks
arguments: that is the business of :mod:`vmae_fast.ops`, the only caller.
"""

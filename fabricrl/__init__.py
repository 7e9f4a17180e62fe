"""fabricrl: reinforcement learning on PyTorch and Lightning Fabric, one readable script per algorithm."""

__version__ = "0.1.0"

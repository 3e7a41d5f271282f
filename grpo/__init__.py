"""Group Relative Policy Optimization in plain PyTorch: one file per step of the algorithm."""

"""Validation, fake kernels and autograd, one file per op family; kernels live in csrc/<family>/."""

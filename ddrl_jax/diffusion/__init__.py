"""Noise schedules, step kernels and solvers: one formula, one function."""

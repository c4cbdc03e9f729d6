"""Timing of the kernels against peers, alternating in one process."""

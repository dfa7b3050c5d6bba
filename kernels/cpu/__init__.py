"""Kernels for CPUs, in C++ behind a plain C interface: FP8 and BF16 weights stay what they are in memory.

`library` loads them and says what they can do; the rest are their wrappers over torch tensors.
"""

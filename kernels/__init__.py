"""Fused kernels, one file each; imported by nobody but :mod:`loratools.dispatch`.

A kernel file holds its specification (a ``..._reference`` in float64), the Triton body, the launcher, and ``@fuses``.
"""

"""Fused kernels, one file each; imported by nobody but :mod:`loratools.dispatch`."""

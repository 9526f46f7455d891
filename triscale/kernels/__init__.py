"""Triton kernels for inference: NHWC, bf16 or fp16, fp32 accumulation, batch norm folded in, and a torch reference beside each.

Only `machine` and the package itself can be imported where Triton isn't installed: ask `machine.unsupported` first.
"""

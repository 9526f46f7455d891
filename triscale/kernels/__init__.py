"""Triton kernels for inference: NHWC, bf16 or fp16, fp32 accumulation, batch norm folded in, and a torch reference beside each.

Where Triton isn't installed the kernels' own files (depthwise, stem, squeeze, pointwise, activation) can't be imported: ask
`machine.unsupported` first.
"""

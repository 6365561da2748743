"""Hand-written computations for training steps, with the same results as torch's own operations.

May import ``factors.compose`` and ``factors.methods``. A module each:

- `conditions`: when torch's own operations must run instead;
- `form`: the forms of weight that can be computed here;
- `weight` and `operands`: weights from factors as one node of autograd;
- `buffers`: memory of composed weights, used again in the next step;
- `linear`: a linear layer's output, by `linear_factors`, `linear_blocks` or `linear_fused`;
- `native` and `native_library`: the same by the optional distribution fedpara-plugins-kernels.
"""

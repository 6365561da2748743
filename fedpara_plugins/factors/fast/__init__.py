"""Hand-written ways to compute what factors mean, for training steps. Results are the same.

`weight` composes a weight; `linear_blocks` and `linear_factors` give a linear layer's output
without ever holding its weight; `conditions` says when torch's own operations must run instead.
"""

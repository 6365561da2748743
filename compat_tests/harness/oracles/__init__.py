"""Independent computations of the result that a run must have, in plain torch.

It imports `harness.cells`, and of the plugin only the conversion of a model and its projection; no
framework and no adapter. It offers the task (`task`), the loops of Flower's strategies
(`plain_loop` with `rules`), SCAFFOLD and FedDyn (`drift`), FedML's optimizers (`fedml_rules`), and
the golden weights that both frameworks must reach (`golden_weights`).
"""

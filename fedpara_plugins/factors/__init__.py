"""Mathematics of factorised weights: from a shape and options to factors, and from factors to W.

May import ``config``, ``support`` and ``errors``; it knows no layer, model, codec or message.
Offers, a module each:

- `methods`: how many operands a weight has and how they combine;
- `ranks`: the rank for a shape, and parameter counts;
- `plan` and `planning`: a weight's plan, and how it follows from the options;
- `compose`: the weight from its factors, by torch's own operations;
- `initialise` and `tanh`: initial factors, and the size of operands under tanh;
- `fit`: the factors that are closest to a trained weight;
- `ratio_check`: the error for a ratio that no rank reaches;
- `fast`: hand-written computations for training steps;
- `projection`: the update of factors that comes closest to the update of a dense weight.

This room is internal; users reach it through `fedpara_plugins.convert`.
"""

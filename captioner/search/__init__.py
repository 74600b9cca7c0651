"""Finding captions over a step function: beam search, sampling, constraints, ensembles.

The imports go one way: rules <- forced_phrases <- constraints <- beams <- decoding <- ensemble, and
selection <- sampling, beams <- decoding. No module here knows a model; ``rules`` and ``hypothesis``
need no torch.
"""

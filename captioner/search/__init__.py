"""Finding captions over a step function: beam search, sampling, constraints, ensembles."""

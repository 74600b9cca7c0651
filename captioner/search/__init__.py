"""Finding captions over a step function: beam search, sampling, constraints, ensembles.

The imports go one way: forced_phrases <- constraints <- beams <- decoding <- ensemble, and
selection <- sampling, beams <- decoding. No module here knows a model.
"""

from captioner.search.constraints import Constraints
from captioner.search.decoding import NO_PROBABILITIES, Hypothesis, decode
from captioner.search.ensemble import ensemble_step

__all__ = ["NO_PROBABILITIES", "Constraints", "Hypothesis", "decode", "ensemble_step"]

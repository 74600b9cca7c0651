"""What a search on a GPU would wait for: its steps copy nothing from the host and read one number.

The operators that a search calls are the same on every device, so a CPU can tell.
"""

from collections import Counter

import pytest
import torch
from step_models import HistoryModel, search
from torch.utils._python_dispatch import TorchDispatchMode

# They make tensors of Python lists and numbers, which are then copied to the device.
COPIES_FROM_HOST = {
    *("aten::lift_fresh", "aten::scalar_tensor", "aten::to.device"),
    *("aten::where.ScalarSelf", "aten::where.ScalarOther", "aten::where.Scalar"),
}
# The host waits until the device has computed their result, or at least its size.
WAITS = {
    *("aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal"),
    *("aten::nonzero", "aten::masked_select", "aten::repeat_interleave.Tensor"),
    *("aten::_unique2", "aten::isin.Tensor_Tensor"),
}
INDEXING = {"aten::index.Tensor", "aten::index_put_", "aten::index_put"}
ALL_CONSTRAINTS = {
    "min_length": 2,
    "no_repeat_ngram": 2,
    "no_repeat_word": True,
    "forbidden_endings": tuple(range(10, 36)),
    "forbidden": ((4,), (5, 6), (7, 8, 9)),
}


class OperatorCounts(TorchDispatchMode):
    """Counts the operators of a search, without those of its model, from the second step on.

    Attributes:
        steps: How often the model has run.
        counts: How often each operator has.
    """

    def __init__(self, model: HistoryModel) -> None:
        super().__init__()
        self.model, self.steps, self.counts = model, 0, Counter()
        self.is_search = True

    def step(self, token_ids, state, memory):
        self.is_search = False
        output = self.model.step(token_ids, state, memory)
        self.is_search, self.steps = True, self.steps + 1
        return output

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if self.is_search and self.steps > 1:
            name = operator.name()
            self.counts[name] += 1
            if name in INDEXING:  # a mask as an index has a result of unknown size
                assert all(index is None or index.dtype != torch.bool for index in args[1])
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("constraints", "settings"),
    [
        ({}, {}),
        (ALL_CONSTRAINTS, {}),
        (ALL_CONSTRAINTS, {"groups": 2}),
        (ALL_CONSTRAINTS, {"samples": 3, "top_k": 7, "top_p": 0.9}),
        (ALL_CONSTRAINTS | {"forced": ((60, 61), (62,))}, {}),
    ],
    ids=["beam", "constraints", "groups", "samples", "forced phrases"],
)
def test_steps_copy_nothing_from_the_host_and_wait_once(constraints, settings):
    model = HistoryModel(vocabulary_size=64, images=16, seed=0, eos=2.0)
    with OperatorCounts(model) as operators:
        search(model, 4, 12, constraints, operators.step, n_best=2, **settings)
    assert len({images for images, _ in model.sizes}) > 1  # leaving images are counted too
    assert operators.counts["aten::index_select"] >= operators.steps - 2
    assert not COPIES_FROM_HOST & operators.counts.keys()
    waits = sum(operators.counts[name] for name in WAITS)
    assert waits < operators.steps  # one in each step

"""Random streams and the data position."""

import numpy as np
import pytest
import torch

from threedr1.engine.runtime import Runtime, batch_indices, stream, torch_stream

CPU = torch.device("cpu")


def test_streams_are_named_by_their_keys():
    assert np.array_equal(stream(1, 2, 3).random(4), stream(1, 2, 3).random(4))
    assert not np.array_equal(stream(1, 2, 3).random(4), stream(1, 3, 2).random(4))
    first = torch.rand(3, generator=torch_stream("cpu", 5, 6))
    assert torch.equal(first, torch.rand(3, generator=torch_stream("cpu", 5, 6)))


def test_every_epoch_is_a_permutation_and_epochs_differ():
    rows = [row for step in range(20) for row in batch_indices(10, step, 3, 0, Runtime(CPU))]
    epochs = [rows[start : start + 10] for start in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_global_batch_does_not_depend_on_the_number_of_ranks():
    for step in range(5):
        alone = batch_indices(50, step, 8, 3, Runtime(CPU))
        together = [row for rank in range(4) for row in batch_indices(50, step, 8, 3, Runtime(CPU, rank, 4))]
        assert alone == together


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="run.batch_size 5 cannot be shared evenly by 2 processes"):
        batch_indices(50, 0, 5, 0, Runtime(CPU, 0, 2))

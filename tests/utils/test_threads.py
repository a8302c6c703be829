"""The threads of PyTorch are limited for a while, and given back."""

import pytest
import torch

from threedr1.utils.threads import one_thread


@pytest.fixture(autouse=True)
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_one_thread_inside_and_as_many_as_before_behind():
    with one_thread():
        assert torch.get_num_threads() == 1
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3


def test_an_error_gives_the_threads_back():
    @one_thread()
    def fail():
        assert torch.get_num_threads() == 1
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fail()
        assert torch.get_num_threads() == 3

import torch

from recontrol.methods.peak_memory import PeakMemory


def test_the_peak_of_memory_is_that_of_the_block():
    with PeakMemory(torch.device("cpu")) as memory:
        held = torch.ones(64 << 18)
        threshold = held.numel() * held.element_size() * 3 // 4
        assert memory.bytes >= threshold
        del held
    with PeakMemory(torch.device("cpu")) as idle:
        pass
    assert idle.bytes < threshold <= memory.bytes

"""The page captures a step in a CUDA graph; here capture and replay are stood in for, and the device is the CPU."""

import contextlib

import torch
from torch import nn

import spectrim
from spectrim.kernels import use

REPLACED = {'device="cuda"': 'device="cpu"', "torch.cuda": "cuda"}


class cuda:  # noqa: N801
    """torch.cuda, as far as the page goes."""

    class Stream:
        def wait_stream(self, stream: "cuda.Stream") -> None: ...

    class CUDAGraph:
        def replay(self) -> None:
            optimizer = spectrim.AdamW(groups, lr=rate)
            optimizer.step()

    current_stream = Stream
    stream = graph = staticmethod(contextlib.nullcontext)


model = nn.Linear(8, 8)
model(torch.randn(2, 8)).sum().backward()
groups = spectrim.param_groups(model)
rate = 5e-4


def clean_up() -> None:
    """Back to the rule that is the default, for the page switches kernels on."""
    use(None)

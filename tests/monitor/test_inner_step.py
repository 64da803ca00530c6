import pytest
import torch
from torch import nn

import spectrim
from spectrim.monitor import Callback


class Derived(torch.optim.AdamW):
    """Calls its parent's step, which is hooked as well once a plain AdamW was made."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            raise RuntimeError("no step")
        return super().step(closure)


def test_a_step_that_calls_its_parents_is_one_step():
    model = nn.Linear(4, 3, bias=False)
    torch.optim.AdamW(model.parameters())
    optimizer = Derived(model.parameters(), lr=0.1, weight_decay=0.0)
    records = []
    with spectrim.SpectralMonitor(model, optimizer, 1, out=Callback(records.append)):
        for step in range(4):
            before = model.weight.detach().clone()
            model(torch.ones(2, 4)).sum().backward()
            optimizer.fails = step == 1
            if optimizer.fails:
                with pytest.raises(RuntimeError, match="no step"):
                    optimizer.step()
                continue
            optimizer.step()
            moved = float((model.weight.detach() - before).norm())
            assert records[-1]["parameters"]["weight"]["update_norm"] == pytest.approx(moved, rel=1e-5)
    assert [record["step"] for record in records] == [1, 2, 3], "a step that raised is none"

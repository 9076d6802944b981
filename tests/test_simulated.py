"""What is marked for a device, run on one that is simulated; and that the simulation can fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from devices import DEVICE

HERE = Path(__file__).parent

# the simulated device stays registered for the rest of the process: it has one of its own
inside = pytest.mark.skipif(DEVICE != "simulated", reason="runs where the device is simulated")


can_simulate = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="torch is too old to simulate a device",
)


@pytest.mark.skipif(DEVICE is not None, reason="there is a device, and what is marked ran on it")
@can_simulate
def test_what_is_marked_for_a_device_passes_on_a_simulated_one():
    files = ("test_cuda.py", "test_krylov.py", "test_simulated.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "cuda"]
    run = subprocess.run(
        [*command, *(str(HERE / file) for file in files)],
        env={**os.environ, "FUNCLSQ_DEVICE": "simulated"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=HERE.parent,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    last = run.stdout.strip().splitlines()[-1]
    assert "failed" not in last and int(last.split()[0]) > 150, last


@pytest.mark.skipif(DEVICE == "simulated", reason="runs from the outside")
@can_simulate
def test_random_problems_on_a_simulated_device():
    command = [sys.executable, "-m", "tests.fuzz", "--device", "simulated", "--cases", "120"]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, cwd=HERE.parent
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "120 cases, 0 failed" in run.stdout


@inside
@pytest.mark.cuda
class TestTheSimulation:
    def some(self, *shape):
        return torch.ones(shape or (3, 2), dtype=torch.float64).to(DEVICE)

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda a: a + torch.ones(3, 2),
            lambda a: a @ torch.ones(2, 2, dtype=torch.float64),
            lambda a: torch.cat((a, torch.ones(3, 2, dtype=torch.float64))),
            lambda a: torch.add(a, a, out=torch.empty(3, 2, dtype=torch.float64)),
            lambda a: torch.ones(2, dtype=torch.float64)[torch.tensor([0]).to(a.device)],
        ],
        ids=["sum", "product", "cat", "out", "index"],
    )
    def test_devices_do_not_mix(self, wrong):
        with pytest.raises(RuntimeError):
            wrong(self.some())

    def test_the_host_cannot_see_the_numbers(self):
        for look in (np.asarray, lambda a: a.numpy(), lambda a: a.data_ptr() or 1 / 0):
            with pytest.raises((RuntimeError, TypeError, ZeroDivisionError)):
                look(self.some())

    def test_what_waits_is_counted(self):
        import simulated

        a = self.some()
        with simulated.counted() as seen:
            float(a.sum())
            bool((a > 0).all())
            a.cpu()
            torch.ones(4).to(DEVICE)
            a.nonzero()
            torch.equal(a, a)
            (a + 1).sum()
        assert dict(seen) == {
            "_local_scalar_dense": 2,
            "to the host": 1,
            "to the device": 1,
            "nonzero": 1,
            "equal": 1,
        }
        assert seen.bytes["to the host"] == 48 and seen.bytes["to the device"] == 16

    def test_views_and_writing_in_place(self):
        a = self.some()
        row = a[1]
        row.mul_(3)
        a[0] = 7
        torch.add(a, 1, out=a)
        assert a.cpu().tolist() == [[8, 8], [4, 4], [2, 2]]
        assert row.cpu().tolist() == [4, 4]

    def test_derivatives_and_transforms(self):
        a = self.some().requires_grad_()
        (bar,) = torch.autograd.grad((a**3).sum(), a)
        assert bar.device.type == DEVICE and bar.cpu().eq(3).all()
        second = torch.func.vmap(torch.func.hessian(lambda r: (r**3).sum()))(self.some())
        assert torch.equal(second.cpu(), 6 * torch.eye(2, dtype=torch.float64).expand(3, 2, 2))

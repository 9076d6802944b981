"""What was prepared is found again by its content, and forgotten in the right order."""

from __future__ import annotations

import gc
import types

import pytest
import torch

from funclsq import kept
from funclsq.operators import DenseOp

KEY = kept.Key("structure", "options")


@pytest.fixture(autouse=True)
def _nothing_kept():
    kept.clear()
    yield
    kept.clear()


def _entry(t, key=KEY, nbytes=0):
    prepared = types.SimpleNamespace(nbytes=nbytes)
    return kept.Entry(key, (t, None), DenseOp(torch.ones(1, 1)), prepared)


def _keep(t, key=KEY, nbytes=0):
    entry = _entry(t, key, nbytes)
    kept.keep(entry, kept.fingerprint(key, entry.data))
    return entry


def _find(t, key=KEY):
    return kept.lookup(key, (t, None), kept.fingerprint(key, (t, None)))


def test_equal_content_finds_the_same_entry():
    t = torch.arange(1000.0)
    entry = _keep(t)
    assert _find(t) is entry
    assert _find(t.clone(), kept.Key("structure", "options")) is entry
    assert _find(t, kept.Key("structure", "other options")) is None
    assert _find(t.double()) is None
    assert _find(t.reshape(10, 100)) is None
    for at in range(0, 1000, 37):  # sampled or not
        other = t.clone()
        other[at] = -1
        assert _find(other) is None
    fingerprint = kept.fingerprint(KEY, (t, None))
    assert kept.lookup(KEY, (t, t), fingerprint) is None
    assert kept.lookup(KEY, (t,), fingerprint) is None
    kept.clear()
    assert _find(t) is None


VIEWS = {
    "float64": lambda t: t.double(),
    "float32": lambda t: t.float(),
    "bfloat16": lambda t: t.bfloat16(),  # unknown to NumPy
    "int64": lambda t: t.long(),
    "complex": lambda t: torch.complex(t, t),
    "conjugate": lambda t: torch.complex(t, t).conj(),
    "negative": lambda t: torch.complex(t, t).conj().imag,
    "transposed": lambda t: t.reshape(4, 5).T,
    "recorded": lambda t: t.clone().requires_grad_(),
}


@pytest.mark.parametrize("view", VIEWS)
def test_content_is_compared_however_it_lies(view):
    t = torch.arange(20.0)
    entry = _keep(VIEWS[view](t))
    assert _find(VIEWS[view](t.clone())) is entry
    for at in (0, 7, 19):
        other = t.clone()
        other[at] += 1
        assert _find(VIEWS[view](other)) is None
        assert not kept._same(VIEWS[view](t), VIEWS[view](other))


def test_fingerprints_are_those_of_the_values():
    def of(t):
        return kept.fingerprint(KEY, (t, None))

    t = torch.arange(50.0)
    assert of(t) == of(t.clone()) and hash(of(t)) == hash(of(t.clone()))
    assert of(t) != of(t + 1) and of(t) != of(t.double()) and of(t) != of(t[:40])
    assert kept.fingerprint(KEY, (None, t)) != of(t)
    z = torch.complex(t, t)
    assert of(z) == of(torch.complex(t, t)) and of(z.conj()) != of(z)
    assert of(torch.ones(4, 5).T) != of(torch.ones(4, 5))  # not read, but of another shape
    assert len(of(torch.arange(1e6))[1][2]) <= 8 * 2 * 16  # a few values only
    assert of(torch.zeros(0)) == of(torch.zeros(0))
    assert of(torch.tensor(2.0)) != of(torch.tensor(3.0))


def test_the_sixteen_that_were_used_last_are_kept():
    many = [torch.full((3,), float(i)) for i in range(17)]
    for t in many[:16]:
        _keep(t)
    assert all(_find(t) is not None for t in many[:16])
    assert _find(many[0]) is not None  # used again
    _keep(many[16])
    assert _find(many[1]) is None
    assert all(_find(t) is not None for i, t in enumerate(many) if i != 1)


def test_a_gibibyte_is_kept_and_the_newest_whatever_its_size():
    def sizes(*parts):
        kept.clear()
        tensors = [torch.full((3,), float(i)) for i in range(len(parts))]
        for t, part in zip(tensors, parts):
            _keep(t, nbytes=int(part * 2**30))
        return [_find(t) is not None for t in tensors]

    assert sizes(0.4, 0.4) == [True, True]
    assert sizes(0.4, 0.4, 0.4) == [False, True, True]
    assert sizes(0.4, 0.4, 0.9) == [False, False, True]
    assert sizes(0.1, 5.0) == [False, True]
    assert sizes(0.1, 5.0, 0.2) == [False, False, True]
    big = torch.zeros(2**18)  # 1 MiB of data counts too
    assert _keep(big, nbytes=7).nbytes == 2**20 + 7


def test_entries_of_one_fingerprint_are_told_apart():
    a = torch.zeros(1000)
    b = a.clone()
    b[5] = 1  # not sampled
    first, second = _keep(a), _keep(b)
    assert first.found_by == second.found_by
    assert _find(a) is first and _find(b) is second
    for i in range(1, 16):
        _keep(torch.full((3,), float(i)))
    assert _find(a) is None and _find(b) is second


def test_data_is_new_once_until_sixteen_others_were_seen():
    assert kept.new("a") and not kept.new("a")
    for i in range(15):
        assert kept.new(i)
    assert not kept.new("a")  # and so seen lately
    for i in range(15, 30):
        assert kept.new(i)
    assert not kept.new("a")
    for i in range(30, 46):
        assert kept.new(i)
    assert kept.new("a")


def test_what_is_pinned_is_found_as_long_as_somebody_holds_it():
    t = torch.arange(5.0)
    entry = _entry(t)
    kept.pin(entry)
    kept.clear()
    assert _find(t) is entry and _find(t + 1) is None
    assert _find(t, kept.Key("another")) is None
    del entry
    gc.collect()
    assert _find(t) is None


def test_keys():
    a, b = kept.Key(1, (2, 3)), kept.Key(1, (2, 3))
    assert a == b and hash(a) == hash(b) and a == a
    assert a != kept.Key(1, (2, 4)) and a != (1, (2, 3))

"""The demo: its matrix, its derivatives, and that learning pays on samples it never saw."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch

import funclsq.demo
from funclsq.cli import main
from funclsq.demo import agree, count_ticks, draw_picture, run, table, to_dict
from funclsq.demo.findings import errors
from funclsq.demo.learn import descend, log_error, start_from, try_one_weight
from funclsq.demo.samples import SURVEYS, draw
from funclsq.demo.terrain import KINDS, LogWeights, Terrain, classes
from funclsq.validate import Report, Row

pytest.importorskip("matplotlib")
SHAPE = (9, 11)


@pytest.fixture(scope="module")
def small():
    """A hill, its samples, its equations, classes of its points, some log weights."""
    y, x = np.indices(SHAPE)
    hill = 300 * np.exp(-((y - 4) ** 2 + (x - 5) ** 2) / 12)
    split = draw(hill, share=0.6, seed=1)
    rng = np.random.default_rng(2)
    kinds = rng.integers(0, 3, SHAPE)
    log_weights = LogWeights(
        torch.from_numpy(rng.standard_normal(len(SURVEYS))),
        torch.from_numpy(rng.standard_normal((len(KINDS), 3)) - 3),
    )
    return split, Terrain.assemble(SHAPE, split.fit), kinds, log_weights


def test_the_matrix_against_a_loop(small):
    split, terrain, kinds, log_weights = small
    rows, weights = [], []
    for point, survey in zip(split.fit.points, split.fit.survey):
        rows.append(np.zeros(SHAPE))
        rows[-1].flat[point] = 1
        weights.append(log_weights.surveys[survey])
    for kind, (offsets, coefficients) in enumerate(KINDS.values()):
        for i, j in itertools.product(*map(range, SHAPE)):
            places = [(i + di, j + dj) for di, dj in offsets]
            if max(p[0] for p in places) < SHAPE[0] and max(p[1] for p in places) < SHAPE[1]:
                rows.append(np.zeros(SHAPE))
                for place, coefficient in zip(places, coefficients):
                    rows[-1][place] = coefficient
                centre = places[len(places) // 2]
                weights.append(log_weights.smoothness[kind, kinds[centre]])
    A = np.zeros(terrain.pattern.shape)
    A[terrain.pattern.row, terrain.pattern.col] = terrain.values.numpy()
    np.testing.assert_array_equal(A, np.reshape(rows, (len(rows), -1)))
    groups = torch.from_numpy(terrain.groups(kinds))
    every = torch.cat([t.flatten() for t in log_weights])[groups]
    torch.testing.assert_close(every, torch.stack(weights))
    w = every.exp().numpy()
    surface = terrain.surface(log_weights, groups).numpy()
    np.testing.assert_allclose(
        surface, np.linalg.solve(A.T * w @ A, A.T @ (w * terrain.b.numpy())), rtol=1e-8
    )


def test_the_gradient_of_the_validation_error(small):
    split, terrain, kinds, log_weights = small
    groups = torch.from_numpy(terrain.groups(kinds))

    def error(surveys, smoothness):
        surface = terrain.surface(LogWeights(surveys, smoothness), groups)
        return log_error(surface, split.validation)

    leaves = tuple(t.clone().requires_grad_() for t in log_weights)
    assert torch.autograd.gradcheck(error, leaves, rtol=1e-6)
    slopes = torch.autograd.grad(error(*leaves), leaves)
    assert abs(sum(float(s.sum()) for s in slopes)) < 1e-10  # a common factor changes nothing


def test_classes_depend_on_steepness_alone():
    y, x = np.indices((60, 80)).astype(float)
    surface = np.where(x < 40, 0.0, 10 * (x - 40))
    found = classes(surface, (1 / 3, 2 / 3))
    assert set(np.unique(found)) <= {0, 1, 2}
    assert (found[:, :20] == 0).all()
    assert (found[:, 60:] > 0).all()
    np.testing.assert_array_equal(found, classes(surface + 100, (1 / 3, 2 / 3)))


def test_samples_are_split_without_overlap():
    truth = np.arange(2000.0).reshape(40, 50)
    split = draw(truth, share=0.5, seed=3)
    assert [len(part) for part in split] == [600, 200, 200]
    points = np.concatenate([part.points for part in split])
    assert len(np.unique(points)) == 1000
    everything = [np.concatenate([getattr(p, key) for p in split]) for key in ("heights", "survey")]
    noise = everything[0] - truth.ravel()[points]
    for number, survey in enumerate(SURVEYS):
        mine = noise[everything[1] == number]
        assert abs(mine.std() / survey.noise - 1) < 0.2
        assert abs(len(mine) / 1000 - survey.share) < 0.1


def test_descent_ends_no_higher_than_it_began(small):
    split, terrain, kinds, _ = small
    said: list[str] = []
    one = try_one_weight(terrain, split.validation, np.logspace(-3, 1, 5), said.append)
    start = start_from(one.log_weights, 3)
    learnt = descend(terrain, split.validation, kinds, start, 6, said.append, surveys=False)
    assert float(log_error(learnt.surface, split.validation).exp()) <= learnt.errors[0] + 1e-9
    torch.testing.assert_close(learnt.log_weights.surveys, start.surveys, rtol=0, atol=0)
    assert len(said) == len(one.errors) + len(learnt.errors)


# ---- the whole


@pytest.fixture(scope="module")
def found():
    """``--quick``, with everything said on the way."""
    said: list[str] = []
    demo = run(quick=True, tick=said.append)
    assert len(said) <= count_ticks()
    return demo


def test_learnt_weights_beat_the_best_single_weight(found):
    assert found.better
    for name in ("test samples", "true surface"):
        single, _, both = errors(found)[name]
        assert both < 0.98 * single
    best = int(np.argmin(found.single.errors))
    assert 0 < best < len(found.strengths) - 1  # the grid of single weights is wide enough
    surveys = found.both.log_weights.relative().surveys.exp()
    assert float(surveys[1]) < 0.1  # the noisy survey is found out


def test_frameworks_and_oracles_agree(found):
    assert found.good
    whole, patch = found.reports
    assert patch
    if whole.rows:
        assert whole
        assert {row.quantity for row in whole.rows} >= {"value", "gradient, surveys"}
    else:
        pytest.importorskip("jax")


def test_table_and_json(found):
    text = table(found)
    for word in ("test samples", "true surface", "old survey", "curvature xy", "passed"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 100
    content = json.loads(json.dumps(to_dict(found), allow_nan=False))
    assert content["passed"] is True
    assert set(content["rms_error"]["test samples"]) == {
        "single weight",
        "smoothness learnt",
        "surveys too",
    }
    assert len(content["validation"]["single weight"]) == 10


def test_picture(found, tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "terrain.png"
    draw_picture(found, str(path))
    image = imread(path)
    assert image.shape[0] > 600
    assert image.shape[1] > 1200
    assert image.std() > 0.1


def test_command(found, tmp_path, monkeypatch, capsys):
    def rerun(**settings):
        calls.append(settings)
        return found

    calls: list[dict] = []
    monkeypatch.setattr(funclsq.demo, "run", rerun)
    path = tmp_path / "picture.png"
    assert main(["demo", "--quick", "--json", "-o", str(path), "--seed", "5"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["picture"] == str(path)
    assert path.stat().st_size > 100_000
    assert calls[0]["quick"] is True
    assert calls[0]["seed"] == 5
    assert calls[0]["solver"] == "cholesky"


def test_command_fails_where_a_comparison_does(found, tmp_path, monkeypatch, capsys):
    wrong = Report("planted", (Row("x", "torch", "jax", 1.0, 1e-9, "planted"),))
    worse = type(found)(**{**vars(found), "reports": (wrong,)})
    monkeypatch.setattr(funclsq.demo, "run", lambda **_: worse)
    assert main(["demo", "-o", str(tmp_path / "picture.png")]) == 1
    said = capsys.readouterr()
    assert "FAILED" in said.out
    assert "a comparison failed" in said.err


def test_without_jax_the_comparison_is_left_out(small, monkeypatch):
    split, terrain, kinds, log_weights = small
    monkeypatch.setattr(agree.importlib.util, "find_spec", lambda name: None)
    report = agree.against_jax(terrain, split.validation, kinds, log_weights)
    assert report.rows == ()
    assert "pip install 'funclsq[jax]'" in report.notes[0]

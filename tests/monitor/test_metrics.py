"""The metrics of a matrix, cheap and exact, against the float64 singular value decomposition, for spectra of every
kind."""

import math

import pytest
import torch

from spectrim.monitor.metrics import MatrixRequest, measure, rank_of_spike, read, singular_values

#: Of the last one a Krylov space has 48 columns, of which the host gets 32.
SHAPES = [(48, 120), (300, 40), (96, 96), (3, 5), (1, 7), (6, 1), (300, 420)]
KINDS = ["noise", "power law", "spike", "cauchy"]


def matrix(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    noise = torch.randn(shape)
    if kind == "cauchy":
        return noise / torch.randn(shape)
    if kind == "noise":
        return noise
    U, sigma, Vh = torch.linalg.svd(noise, full_matrices=False)
    places = torch.arange(1, len(sigma) + 1)
    wanted = places**-0.5 if kind == "power law" else torch.where(places <= 2, 30.0, 1.0 / places)
    return (U * wanted) @ Vh


def values(X: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(X.double())


def metrics(X: torch.Tensor, *, exact: bool = False) -> dict[str, torch.Tensor]:
    """The metrics of a gradient X (m, n) or (E, m, n), as tensors (E,)."""
    shape = X.shape[-2:]
    request = MatrixRequest("gradient", tuple(shape), rank_of_spike(shape), exact)
    found = read(request, measure(request, X.reshape(-1, *shape)))
    energy, norm = found["energy"], found["norm"]
    ratios = {
        "share": found["spike"] / energy,
        "stable_rank": energy / norm**2,
        "localisation": found["largest"] / norm,
    }
    return {**found, **ratios}


def share_above(X: torch.Tensor, threshold: float | torch.Tensor, *, exact: bool = False) -> torch.Tensor:
    request = MatrixRequest("direction", tuple(X.shape[-2:]), 1, exact)
    return read(request, measure(request, X.reshape(-1, *X.shape[-2:])), limit=threshold)["above"]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_metrics_are_those_of_the_singular_value_decomposition(kind, shape):
    X = matrix(kind, shape)
    sigma = values(X)
    energy = X.double().square().sum()
    rank = max(1, round(0.015 * min(shape)))
    assert torch.allclose(singular_values(X), sigma, rtol=1e-6, atol=float(1e-7 * sigma[0]))
    found = metrics(X, exact=True)
    assert torch.allclose(found["norm"], sigma[0])
    assert torch.allclose(found["stable_rank"], energy / sigma[0] ** 2)
    assert torch.allclose(found["share"], sigma[:rank].square().sum() / energy)
    assert torch.allclose(found["localisation"], X.abs().max() / sigma[0])
    for share in (0.2, 0.5, 0.9):
        threshold = float(sigma[min(len(sigma) - 1, int(share * len(sigma)))]) * 0.999
        assert share_above(X, threshold, exact=True) == (sigma > threshold).double().mean()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_cheap_metrics_are_near_the_exact_ones_and_nearer_where_a_spectrum_decays(kind, shape):
    X = matrix(kind, shape)
    near = 0.02 if kind == "noise" else 1e-4
    cheap, exact = metrics(X), metrics(X, exact=True)
    assert 1 - near <= cheap["norm"] / values(X)[0] <= 1 + 1e-6
    assert (1 - 3 * near) * exact["share"] <= cheap["share"] <= exact["share"] * (1 + 1e-6)
    assert cheap["stable_rank"] == pytest.approx(float(exact["stable_rank"]), rel=2.5 * near)
    assert cheap["localisation"] == pytest.approx(float(exact["localisation"]), rel=1.5 * near)


def test_a_spike_of_rank_k_is_found_in_a_large_matrix():
    X = matrix("noise", (400, 600)) + 4 * torch.randn(400, 6) @ torch.randn(6, 600)
    assert metrics(X)["share"] == pytest.approx(float(metrics(X, exact=True)["share"]), rel=1e-4)


@pytest.mark.parametrize("shape", [(250, 300), (900, 260)])
@pytest.mark.parametrize("c", [0.3, 1.0, 3.0])
def test_the_estimated_share_of_a_clipped_spectrum_is_within_three_hundredths(shape, c):
    X = matrix("noise", shape) / 10 + matrix("spike", shape)
    U, sigma, Vh = torch.linalg.svd(X, full_matrices=False)
    clipped = (U * (sigma / torch.sqrt(1 + (sigma / c) ** 2))) @ Vh
    assert float(share_above(clipped, c / math.sqrt(2))) == pytest.approx(float((sigma > c).double().mean()), abs=0.03)


def test_metrics_of_a_stack_are_those_of_its_matrices():
    stack = torch.stack([matrix(kind, (20, 33)) for kind in KINDS])
    each = [metrics(X) for X in stack]
    for name, together in metrics(stack).items():
        assert torch.allclose(together, torch.cat([one[name] for one in each]), rtol=1e-5), name
    thresholds = torch.tensor([0.5, 0.2, 3.0, 10.0])
    one_by_one = torch.cat([share_above(X, c) for X, c in zip(stack, thresholds, strict=True)])
    assert torch.allclose(share_above(stack, thresholds), one_by_one)


@pytest.mark.parametrize(("tail", "expected"), [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0)])
def test_the_tail_index_is_the_exponent_of_a_pareto_tail(tail, expected):
    X = torch.rand(600, 500).pow(-1 / tail) * torch.randn(600, 500).sign()
    assert float(metrics(X, exact=True)["tail_index"]) == pytest.approx(expected, rel=0.05)
    assert float(metrics(X)["tail_index"]) == pytest.approx(expected, rel=0.15)


def test_gaussian_localisation_is_near_its_expectation():
    m, n = 200, 300
    expected = math.sqrt(2 * math.log(m * n)) / (math.sqrt(m) + math.sqrt(n))
    assert float(metrics(torch.randn(m, n))["localisation"]) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("kind", ["gradient", "update", "direction"])
@pytest.mark.parametrize("small", [30, 300])
def test_stacks_that_differ_in_the_larger_side_are_measured_together_as_each_by_itself(kind, small):
    stacks = [torch.randn(2, small, small + 50), torch.randn(1, small + 90, small), torch.randn(3, small, small)]
    request = MatrixRequest(kind, (small, small + 50), 4, exact=False)
    together = measure(request, *stacks)
    apart = torch.cat([measure(request, stack) for stack in stacks])
    for name, values in read(request, together, limit=20.0).items():
        assert torch.allclose(values, read(request, apart, limit=20.0)[name], rtol=1e-5), name


def test_a_large_matrix_of_zeros_has_norm_zero_and_a_tiny_one_is_measured_like_any_other():
    X = torch.randn(300, 400)
    stack = torch.stack([torch.zeros_like(X), X, 1e-30 * X])
    norms = metrics(stack)["norm"]
    assert norms[0] == 0
    assert norms[2] == pytest.approx(1e-30 * float(norms[1]), rel=1e-4)


def test_zero_and_non_finite_matrices_have_numbers_or_none_but_raise_nothing():
    zero = metrics(torch.zeros(4, 6))
    assert zero["norm"] == 0
    assert zero["stable_rank"].isnan()
    stack = torch.randn(2, 8, 9)
    stack[0, 3, 3] = math.nan
    norms = metrics(stack)["norm"]
    assert norms[0].isnan()
    assert norms[1] == pytest.approx(float(values(stack[1])[0]), rel=1e-4)
    assert share_above(stack, 1.0)[0].isnan()
    assert singular_values(stack)[0].isnan().all()


def test_metrics_draw_no_random_number_and_leave_their_argument_alone():
    X = torch.randn(30, 40)
    kept, state = X.clone(), torch.get_rng_state()
    first, again = ({**metrics(X), "above": share_above(X, 3.0)} for _ in range(2))
    assert first == again
    assert torch.equal(X, kept)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["gradient", "momentum", "update", "direction", "weight"])
@pytest.mark.parametrize("exact", [False, True])
def test_rows_of_numbers_are_as_long_as_their_order_says(kind, exact):
    order = MatrixRequest(kind, (20, 33), 2, exact)
    X = torch.randn(3, 20, 33)
    numbers = measure(order, X)
    assert numbers.shape == (3, order.length)
    reading = read(order, numbers, limit=4.0)
    if kind == "direction":
        assert torch.allclose(reading["above"], share_above(X, 4.0, exact=True))
    else:
        assert torch.allclose(reading["norm"], values(X)[:, 0], rtol=0.02)


def test_an_exact_order_reads_all_entries():
    X = torch.rand(1, 300, 400).pow(-0.5)
    largest = X.double().flatten().sort(descending=True).values[: round(0.01 * X.numel()) + 1]
    hill = 1 / (largest[:-1] / largest[-1]).log().mean()
    assert torch.allclose(metrics(X, exact=True)["tail_index"], hill)
    assert not torch.allclose(metrics(X)["tail_index"], hill)

"""The spike: how much energy is followed, and the shaped matrix against its formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import oracle
import spectra
from spectrim.operators import shape_spike, spike, spike_correction, track_spike
from spectrim.operators.spike import follow_and_shape_stacks, start_basis


def captured(M, U):
    """Energy in the span of U over the most that any subspace of its rank holds."""
    best = torch.linalg.svdvals(M.double())[..., : U.shape[-1]].square().sum()
    return ((U.double().mT @ M.double()).square().sum() / best).item()


def rotation(n, angle, generator):
    A = torch.randn(n, n, generator=generator, dtype=torch.float64)
    A = A - A.mT
    return torch.matrix_exp(A * (angle / torch.linalg.matrix_norm(A, ord=2)))


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (64, 64)])
def test_one_warm_step_follows_a_slowly_turning_matrix(shape):
    generator = torch.Generator().manual_seed(0)
    m, n = shape
    M = spectra.matrix(m, n, spectra.ten_spikes(min(m, n)))
    left, right = rotation(m, 0.05, generator), rotation(n, 0.05, generator)
    V = V_of_six = None
    for _ in range(20):
        spike = track_spike(M.float(), V, rank=10)
        assert captured(M, spike.U) > 0.99
        six = track_spike(M.float(), V_of_six, rank=6)
        V, V_of_six = spike.V, six.V
        last, M = M, left @ M @ right
    assert captured(last, six.U) > 0.99  # no gap after the sixth value: found only with time


def test_a_sudden_change_is_followed_within_a_few_steps():
    V = track_spike(spectra.with_spectrum("ten spikes", 60, 80, seed=1).float(), None, rank=10).V
    M = spectra.with_spectrum("ten spikes", 60, 80, seed=2).float()
    for _ in range(3):
        spike = track_spike(M, V)
        V = spike.V
    assert captured(M, spike.U) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (3, 40, 64), (2, 2, 12, 9)])
def test_the_shaped_matrix_and_its_norm_match_the_formula(shape, dtype):
    M = torch.stack([spectra.with_spectrum("ten spikes", *shape[-2:], seed=seed) for seed in range(4)])
    M = (M[: max(1, torch.Size(shape[:-2]).numel())].reshape(shape) * 50).to(dtype)
    before = M.clone()
    spike = track_spike(M, None, rank=4)
    shaped = shape_spike(M, spike)
    assert shaped.dtype == dtype
    assert torch.equal(M, before)
    working = torch.float64 if dtype == torch.float64 else torch.float32
    assert {part.dtype for part in spike} == {working}
    flat = [part.reshape(-1, *part.shape[-2:]) for part in (M, spike.U, spike.V, shaped)]
    correction = spike_correction(M, spike)
    assert correction.norm.shape == M.shape[:-2]
    rough = {torch.bfloat16: 4e-3, torch.float16: 5e-4}.get(dtype, 1e-5)
    for M_i, U, V, O_i in zip(*flat, strict=True):
        assert oracle.relative_error(O_i, oracle.shape_spike(M_i, U, V)) < rough
    formed = M.double() + (correction.U @ correction.right.mT).double()
    torch.testing.assert_close(correction.norm.double(), torch.linalg.matrix_norm(formed), rtol=1e-5, atol=0)


def test_the_norm_survives_a_spike_that_holds_nearly_all_energy():
    sigma = torch.full((50,), 1e-4)
    sigma[0] = 1.0  # the tail holds 5e-7 of the energy: float32 norms would cancel to nothing
    M = spectra.matrix(50, 70, sigma).float()
    spike = track_spike(M, None, rank=1)
    correction = spike_correction(M, spike)
    exact = torch.linalg.matrix_norm(oracle.shape_spike(M, spike.U, spike.V))
    torch.testing.assert_close(correction.norm.double(), exact, rtol=2e-2, atol=0)


@pytest.mark.parametrize("rank", [5, 8])
def test_a_spike_that_holds_everything_leaves_the_matrix_alone(rank):
    M = spectra.matrix(8, 12, torch.linspace(1, 0.5, 8) * (torch.arange(8) < 5)).float()
    spike = track_spike(M, None, rank=rank)
    assert torch.equal(shape_spike(M, spike), M)
    torch.testing.assert_close(spike_correction(M, spike).norm, torch.linalg.matrix_norm(M))


@pytest.mark.parametrize("shape", [(1, 1), (6, 9), (2, 9, 6)])
def test_zero_stays_zero_and_keeps_the_basis(shape):
    V = track_spike(torch.ones(shape), None, rank=1).V
    spike = track_spike(torch.zeros(shape), V)
    assert torch.equal(spike.V, V)
    assert torch.equal(shape_spike(torch.zeros(shape), spike), torch.zeros(shape))
    assert torch.equal(spike_correction(torch.zeros(shape), spike).norm, torch.zeros(shape[:-2]))


def test_the_rank_below_k_in_one_matrix_of_a_stack_changes_nothing_for_the_others():
    full, low = spectra.with_spectrum("ten spikes", 20, 30), spectra.matrix(20, 30, torch.eye(20)[0])
    both = torch.stack([full, low]).float()
    shaped = shape_spike(both, track_spike(both, None, rank=3))
    torch.testing.assert_close(shaped[0], shape_spike(both[0], track_spike(both[0], None, rank=3)))
    torch.testing.assert_close(shaped[1], both[1])


def test_sparse_matrices_whose_rank_is_below_k_to_the_last_digit_stay_finite():
    # What rounding leaves of a column that depends on others exactly depends on them too: a factor must exist.
    generator = torch.Generator().manual_seed(0)
    shape = (1000, 4, 33)
    M = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.06)
    M[:, 0] = 0
    V = start_basis(33, 4, device=M.device, dtype=M.dtype).expand(1000, 33, 4)
    ((correction, basis),) = follow_and_shape_stacks([M], [V], steps=4)
    assert all(value.isfinite().all() for value in (*correction, basis))
    # All is spike and nothing is tail, so nothing is shrunk.
    torch.testing.assert_close(correction.norm, torch.linalg.matrix_norm(M))
    found = (correction.U.double().mT @ M.double()).square().sum((-2, -1))
    torch.testing.assert_close(found, M.double().square().sum((-2, -1)), rtol=1e-5, atol=1e-6)


def test_large_and_small_entries_do_not_overflow():
    for size in (1e-30, 1e30):
        M = spectra.with_spectrum("ten spikes", 20, 30).float() * size
        spike = track_spike(M, None, rank=2)
        shaped, norm = shape_spike(M, spike), spike_correction(M, spike).norm
        assert shaped.isfinite().all()
        torch.testing.assert_close(norm.double(), torch.linalg.matrix_norm(shaped.double()), rtol=1e-4, atol=0)


def test_the_start_depends_on_nothing_but_the_shape():
    M = spectra.with_spectrum("ten spikes", 20, 30).float()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = track_spike(M, None, rank=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(track_spike(M, None, rank=3).V, first.V)
    assert captured(M, first.U) > 0.95


def test_bad_arguments_are_named_with_what_is_allowed():
    M = torch.ones(4, 6)
    for rank in (None, 0, 5):
        with pytest.raises(ValueError, match=rf"rank={rank} .*expected 1 to 4"):
            track_spike(M, None, rank=rank)
    with pytest.raises(ValueError, match=r"V of shape \(4, 2\).*expected .*6, k\)"):
        track_spike(M, torch.ones(4, 2))
    with pytest.raises(ValueError, match="steps=0"):
        track_spike(M, None, rank=2, steps=0)


@pytest.fixture(params=["on a host", "as on a device"])
def path(request, monkeypatch):
    """What a device does is done on the CPU as well: nothing is read, and products are written where they belong."""
    if request.param == "as on a device":
        monkeypatch.setattr(spike, "reading_is_free", lambda X: False)


def bases(Ms, ranks):
    return [
        start_basis(M.shape[2], k, device=M.device, dtype=M.dtype).expand(len(M), -1, -1)
        for M, k in zip(Ms, ranks, strict=True)
    ]


def stacks():
    """Stacks of several shapes, one of them transposed, and one with a matrix of zeros."""
    names = ["ten spikes", "one spike", "ten spikes", "geometric"]
    shapes = [(40, 60), (60, 40), (30, 30), (50, 20)]
    Ms = [
        torch.stack([spectra.with_spectrum(name, *shape, seed=seed) for seed in range(3)]).float()
        for name, shape in zip(names, shapes, strict=True)
    ]
    Ms[1] = Ms[1].mT.contiguous().mT
    Ms[2][1] = 0
    return Ms, bases(Ms, (4, 4, 2, 1))


def formed(M, correction):
    return M.double() + correction.U.double() @ correction.right.double().mT


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("steps", [1, 4])
def test_stacks_of_several_shapes_are_shaped_together_as_the_formula_says(steps):
    Ms, Vs = stacks()
    for M, V, (correction, basis) in zip(Ms, Vs, follow_and_shape_stacks(Ms, Vs, steps=steps), strict=True):
        expected = track_spike(M, V, steps=steps)
        torch.testing.assert_close(basis, expected.V, rtol=1e-4, atol=1e-5)
        shaped = formed(M, correction)
        for i in range(len(M)):
            by_formula = oracle.shape_spike(M[i], expected.U[i], expected.V[i]) if M[i].any() else M[i].double()
            assert oracle.relative_error(shaped[i], by_formula) < 1e-5
        torch.testing.assert_close(correction.norm.double(), torch.linalg.matrix_norm(shaped), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("path")
def test_a_large_tail_is_formed_in_parts(monkeypatch):
    Ms, Vs = stacks()
    whole = follow_and_shape_stacks(Ms, Vs)
    for entries in (5000, 500, 1):  # two matrices at a time, some rows, one row
        monkeypatch.setattr(spike, "TAIL_ENTRIES", entries)
        for (mine, _), (expected, _) in zip(follow_and_shape_stacks(Ms, Vs), whole, strict=True):
            torch.testing.assert_close(mine.norm, expected.norm, rtol=1e-6, atol=0)
            torch.testing.assert_close(mine.right, expected.right, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 8), st.floats(0, 8), st.integers(0, 9999))
def test_the_left_basis_is_orthonormal_to_rounding_whatever_the_columns(m, k, rank, decades, seed):
    k, generator = min(k, m), torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    # Columns of any lengths, nearly or wholly dependent.
    columns = random(3, m, min(rank, k)) @ random(3, min(rank, k), k) + 10**-decades * random(3, m, k)
    columns = columns * 10 ** (60 * torch.rand(3, 1, k, generator=generator) - 30)
    Q = spike._orthonormal(columns)
    gram = Q.double().mT @ Q.double()
    lengths = gram.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(gram, torch.diag_embed((lengths > 0.5).double()), rtol=0, atol=1e-6)
    if decades < 4 and rank >= k:
        assert (lengths > 0.5).all()
        rest = columns.double() - Q.double() @ (Q.double().mT @ columns.double())
        assert (rest.norm(dim=-2) < 1e-5 * columns.double().norm(dim=-2)).all()


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("size", [1e-45, 1e-41, 1e-38, 1e-30, 1.0, 1e30, 1e36])
@pytest.mark.parametrize("kind", ["full", "rank one", "zero", "one entry", "constant", "half of it zero"])
def test_everything_is_finite_for_any_size_and_rank(kind, size):
    generator = torch.Generator().manual_seed(0)
    M = torch.randn(2, 12, 9, generator=generator)
    if kind == "rank one":
        M = M[:, :, :1] @ M[:, :1, :]
    elif kind == "constant":
        M = torch.ones_like(M)
    elif kind != "full":
        M[:, (0 if kind == "zero" else 1 if kind == "one entry" else 6) :] = 0
        M[:, :, (1 if kind == "one entry" else 9) :] = 0
    M = M * size
    start = start_basis(9, 3, device=M.device, dtype=M.dtype).expand(2, -1, -1)
    for V in (start, start[..., :1].expand(-1, -1, 3), torch.zeros_like(start)):
        for steps in (1, 4):
            ((correction, basis),) = follow_and_shape_stacks([M], [V], steps=steps)
            assert all(part.isfinite().all() for part in (*correction, basis))
            if kind == "zero":
                assert torch.equal(basis, V)
                assert not correction.norm.any()
                assert not correction.right.any()
            elif size > 1e-37:
                norm = torch.linalg.matrix_norm(formed(M, correction))
                torch.testing.assert_close(correction.norm.double(), norm, rtol=1e-4, atol=0)


def test_a_momentum_that_decays_to_nothing_stays_finite_until_it_is_zero():
    M = spectra.with_spectrum("ten spikes", 20, 30)[None].float()
    V = bases([M], [3])[0]
    for _ in range(60):
        M = M * 0.15
        ((correction, V),) = follow_and_shape_stacks([M], [V])
        assert all(part.isfinite().all() for part in (*correction, V))
        torch.testing.assert_close(torch.linalg.vector_norm(V, dim=-2), torch.ones(1, 3), rtol=1e-5, atol=0)
        assert correction.norm <= 2 * torch.linalg.matrix_norm(M.double()) + 1e-44
    assert not M.any()
    assert not correction.norm.any()


def test_a_matrix_that_is_not_finite_spoils_no_other():
    Ms, Vs = stacks()
    expected = follow_and_shape_stacks(Ms, Vs)
    Ms[0] = Ms[0].clone()
    Ms[0][1, 2, 3] = float("nan")
    for i, ((mine, basis), (its, its_basis)) in enumerate(zip(follow_and_shape_stacks(Ms, Vs), expected, strict=True)):
        others = [0, 2] if i == 0 else [0, 1, 2]
        for part, whole in zip((*mine, basis), (*its, its_basis), strict=True):
            torch.testing.assert_close(part[others], whole[others])


def test_nothing_is_read_from_a_device_and_no_fake_tensor_is_kept():
    Ms, Vs = stacks()
    with FakeTensorMode() as mode:
        fake = follow_and_shape_stacks([mode.from_tensor(M) for M in Ms], [mode.from_tensor(V) for V in Vs])
    for (mine, basis), (its, its_basis) in zip(fake, follow_and_shape_stacks(Ms, Vs), strict=True):
        for part, whole in zip((*mine, basis), (*its, its_basis), strict=True):
            assert part.shape == whole.shape
            assert type(whole) is torch.Tensor


def test_a_compiler_sees_no_break_and_gives_the_same():
    Ms, Vs = stacks()
    compiled = torch.compile(follow_and_shape_stacks, backend="aot_eager", fullgraph=True)
    for M, (mine, basis), (its, its_basis) in zip(Ms, compiled(Ms, Vs), follow_and_shape_stacks(Ms, Vs), strict=True):
        torch.testing.assert_close(formed(M, mine), formed(M, its), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(basis, its_basis, rtol=1e-5, atol=1e-6)

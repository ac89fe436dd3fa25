"""NeuralEF: the invariants of its definition, refusals, and fits that find known eigenfunctions."""

from __future__ import annotations

import math

import pytest
import torch

import hf_attn
from hf_attn.analysis.neural_ef import (
    l2_batch_norm,
    neural_ef_loss,
    neural_ef_matrix,
    neural_ef_update,
    polynomial_spectrum,
)
from hf_attn.analysis.neural_ef_fit import EigenFunctions, ParallelLinear, draw, exact_spectrum, fit, measure
from hf_attn.analysis.neural_ef_kernels import attention_kernel, ntk_samples, polynomial, rbf
from hf_attn.errors import InvalidInput, InvalidOption

POINTS, FUNCTIONS = 12, 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def features() -> torch.Tensor:
    return torch.randn(POINTS, FUNCTIONS, dtype=torch.float64)


def samples(count: int = 30) -> torch.Tensor:
    return torch.randn(count, POINTS, dtype=torch.float64)


def kernel() -> torch.Tensor:
    drawn = samples()
    return drawn.T @ drawn / len(drawn)


def naive_loss(psi: torch.Tensor, matrix: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The objective with a sum for every pair of points and a term for every pair of functions."""

    def r(first, second):
        points = range(len(weights))
        return sum(weights[a] * weights[b] * first[a] * matrix[a, b] * second[b] for a in points for b in points)

    total = 0
    for j in range(psi.shape[1]):
        total = total - r(psi[:, j], psi[:, j])
        for i in range(j):
            constant = psi[:, i].detach()
            total = total + r(constant, psi[:, j]) ** 2 / r(constant, constant)
    return total


def exact_psi(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0)[:FUNCTIONS] / POINTS, vectors.flip(1)[:, :FUNCTIONS] * math.sqrt(POINTS)


def test_01_mean_square_is_one_in_training():
    psi, norm = l2_batch_norm(features())
    torch.testing.assert_close(psi.square().mean(0), torch.ones(FUNCTIONS).double(), rtol=0, atol=1e-12)
    assert not norm.requires_grad


def test_02_positive_scales_change_nothing():
    given, scale = features(), torch.tensor([3.0, 0.1, 20.0, 1e-3], dtype=torch.float64)
    torch.testing.assert_close(l2_batch_norm(given * scale)[0], l2_batch_norm(given)[0], rtol=0, atol=1e-12)
    matrix = kernel()
    torch.testing.assert_close(neural_ef_loss(given * scale, matrix), neural_ef_loss(given, matrix), rtol=0, atol=1e-12)


def test_03_the_gradient_of_the_loss_is_the_closed_form():
    matrix, given = kernel(), features().requires_grad_()
    (through_loss,) = torch.autograd.grad(neural_ef_loss(given, matrix), given)
    psi, _ = l2_batch_norm(given)
    (through_update,) = torch.autograd.grad(psi, given, neural_ef_update(psi.detach(), matrix))
    torch.testing.assert_close(through_loss, through_update, rtol=1e-10, atol=1e-10)


def test_04_orientation_of_the_mask():
    psi, matrix = l2_batch_norm(features())[0], kernel()
    r = neural_ef_matrix(psi, matrix)
    mixing = torch.eye(FUNCTIONS, dtype=torch.float64) - (r / r.diagonal()).tril(-1).T
    expected = -(matrix @ psi) @ mixing * 2 / POINTS**2
    torch.testing.assert_close(neural_ef_update(psi, matrix), expected, rtol=0, atol=1e-12)


def test_05_exact_eigenvectors_have_no_gradient():
    matrix = kernel()
    psi = exact_psi(matrix)[1].requires_grad_()
    (gradient,) = torch.autograd.grad(neural_ef_loss(psi, matrix), psi)
    assert gradient.abs().max() < 1e-8
    (elsewhere,) = torch.autograd.grad(neural_ef_loss(features_ := features().requires_grad_(), matrix), features_)
    assert elsewhere.abs().max() > 1e-3


def test_06_the_diagonal_holds_the_eigenvalues():
    matrix = kernel()
    values, psi = exact_psi(matrix)
    torch.testing.assert_close(neural_ef_matrix(psi, matrix), values.diag(), rtol=0, atol=1e-9)


def test_07_one_function_is_the_rayleigh_quotient():
    matrix, given = kernel(), features()[:, :1]
    quotient = (given.T @ matrix @ given / (given.T @ given) / POINTS).squeeze()
    torch.testing.assert_close(-neural_ef_loss(given, matrix), quotient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_08_samples_are_the_matrix_they_stand_for(weighted):
    drawn, given = samples(), features().requires_grad_()
    weights = torch.rand(POINTS, dtype=torch.float64).softmax(0) if weighted else None
    form = {"weights": weights}
    one = neural_ef_loss(given, kernel_samples=drawn, **form)
    other = neural_ef_loss(given, kernel=drawn.T @ drawn / len(drawn), **form)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(one, given)[0], torch.autograd.grad(other, given)[0], rtol=1e-10, atol=1e-10
    )


def test_09_evaluation_is_deterministic_and_independent_of_the_batch():
    networks, x = EigenFunctions(2, FUNCTIONS).double(), torch.randn(POINTS, 2, dtype=torch.float64)
    networks(x)
    networks.eval()
    together = networks(x)
    torch.testing.assert_close(torch.cat([networks(row[None]) for row in x]), together, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(networks(x), together, rtol=0, atol=0)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_its_definition(weighted):
    given, matrix = features().requires_grad_(), kernel()
    equal = torch.full((POINTS,), 1 / POINTS, dtype=torch.float64)
    weights = torch.rand(POINTS, dtype=torch.float64).softmax(0) if weighted else equal
    psi = given / (weights[:, None] * given.square()).sum(0).sqrt()
    expected = naive_loss(psi, matrix, weights)
    found = neural_ef_loss(given, matrix, weights=weights if weighted else None)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    first, second = (torch.autograd.grad(loss, given)[0] for loss in (found, expected))
    torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-8)


def test_the_running_norm():
    given = features()
    norm = given.square().mean(0).sqrt()
    torch.testing.assert_close(l2_batch_norm(given)[1], norm)
    old = torch.full((FUNCTIONS,), 2.0, dtype=torch.float64)
    torch.testing.assert_close(l2_batch_norm(given, old, momentum=0.7)[1], 0.7 * old + 0.3 * norm)
    psi, kept = l2_batch_norm(given, old, training=False)
    torch.testing.assert_close(psi, given / 2)
    assert kept is old


def test_a_dead_function_gives_no_nan():
    given = features()
    given[:, 1] = 0
    given.requires_grad_()
    loss = neural_ef_loss(given, kernel())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(given.grad).all()


def test_half_precision_accumulates_in_float32():
    given, matrix = features(), kernel()
    assert neural_ef_loss(given.bfloat16(), matrix.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(
        neural_ef_loss(given.bfloat16(), matrix.bfloat16()).double(),
        neural_ef_loss(given, matrix),
        rtol=2e-2,
        atol=2e-2,
    )


def test_the_polynomial_spectrum():
    expected = [6.944134, 5.239353, 0.923980, 0.117790, 0.005496]
    torch.testing.assert_close(polynomial_spectrum(1.5, 4), torch.tensor(expected).double(), rtol=0, atol=1e-6)
    grid = torch.linspace(-1, 1, 4001, dtype=torch.float64)[:, None]
    on_grid = exact_spectrum(grid[::4], polynomial(1.5, 4), functions=5).eigenvalues
    torch.testing.assert_close(on_grid, polynomial_spectrum(1.5, 4), rtol=1e-2, atol=1e-4)


ASYMMETRIC = torch.eye(POINTS, dtype=torch.float64) + torch.ones(POINTS, POINTS).double().triu(1)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: neural_ef_loss(features()), "neither"),
        (lambda: neural_ef_loss(features(), kernel(), samples()), "both"),
        (lambda: neural_ef_loss(features(), ASYMMETRIC), "not symmetric"),
        (lambda: neural_ef_matrix(features(), ASYMMETRIC), "not symmetric"),
        (lambda: neural_ef_update(features(), ASYMMETRIC), "not symmetric"),
        (lambda: neural_ef_loss(features(), kernel()[:3]), "kernel .* must be"),
        (lambda: neural_ef_loss(features(), kernel() * math.nan), "not finite"),
        (lambda: neural_ef_loss(features(), kernel_samples=samples()[:, :3]), "kernel_samples"),
        (lambda: neural_ef_loss(features(), kernel(), weights=torch.ones(POINTS)), "sum to 1"),
        (lambda: neural_ef_loss(features(), kernel(), weights=torch.ones(3) / 3), "weights"),
        (lambda: neural_ef_loss(features()[0], kernel()), "features"),
        (lambda: l2_batch_norm(features(), training=False), "running_norm"),
        (lambda: l2_batch_norm(features(), torch.zeros(FUNCTIONS), training=False), "running_norm"),
        (lambda: l2_batch_norm(features(), torch.ones(3)), "running_norm"),
        (lambda: l2_batch_norm(features(), momentum=1.5), "momentum"),
        (lambda: polynomial_spectrum(-1.0, 2), "constant"),
        (lambda: polynomial_spectrum(1.0, 1.5), "degree"),
        (lambda: polynomial(1.5, 0), "degree"),
        (lambda: rbf(0.0), "length"),
        (lambda: EigenFunctions(2, 2).eval()(torch.ones(3, 2)), "running_norm"),
        (lambda: EigenFunctions(2, 2, hidden_size=3), "even"),
        (lambda: EigenFunctions(2, 2, num_layers=1), "num_layers"),
        (lambda: EigenFunctions(2, 0), "functions"),
        (lambda: fit(torch.ones(4), rbf()), "inputs"),
        (lambda: fit(torch.ones(4, 1)), "neither"),
        (lambda: fit(torch.ones(4, 1), lambda x, y: x @ y.T + torch.arange(4.0)), "not symmetric"),
        (lambda: fit(torch.ones(POINTS, 1), kernel()), "pass both alike"),
        (lambda: fit(torch.ones(4, 1), rbf(), batch_size=5), "batch_size"),
        (lambda: fit(torch.ones(4, 1), rbf(), steps=0), "steps"),
        (lambda: fit(torch.ones(4, 1), rbf(), learning_rate=0.0), "learning_rate"),
        (lambda: fit(torch.ones(4, 1), rbf(), schedule="linear"), "schedule"),
    ],
)
def test_refusals(call, match):
    with pytest.raises(InvalidInput, match=match):
        call()


def test_parallel_layers_are_separate_layers():
    layer, x = ParallelLinear(3, 5, 2), torch.randn(3, 5, 7)
    torch.nn.init.normal_(layer.bias)
    expected = torch.stack([layer.weight[j] @ x[j] + layer.bias[j] for j in range(3)])
    torch.testing.assert_close(layer(x), expected)


def test_networks_of_other_functions_do_not_mix():
    networks, x = EigenFunctions(2, 3), torch.randn(6, 2)
    networks.raw(x)[:, 1].sum().backward()
    for name, parameter in networks.named_parameters():
        touched = parameter.grad.flatten(1).abs().sum(1) > 0
        assert touched.tolist() == [False, True, False], name


@pytest.fixture(scope="module")
def found():
    points = torch.rand(128, 1, generator=torch.Generator().manual_seed(0)) * 4 - 2
    return fit(points, rbf(), functions=3, steps=1200, learning_rate=3e-3, progress=False)


def test_a_fit_finds_the_functions_of_rbf(found):
    exact = exact_spectrum(found.inputs, rbf(), functions=3)
    torch.testing.assert_close(found.eigenvalues.double(), exact.eigenvalues, rtol=0.05, atol=0)
    assert (found.cosines(exact) > 0.99).all()
    assert found.converged.all()
    torch.testing.assert_close(found.functions.square().mean(0), torch.ones(3))
    torch.testing.assert_close(found.networks.eigenvalues, found.eigenvalues, rtol=0.05, atol=0)


def test_functions_that_are_not_there_yet_are_flagged(found):
    early = fit(found.inputs, rbf(), functions=3, steps=3, progress=False)
    assert not early.converged.any()
    assert "no" in early.table()


def test_a_function_learned_twice_is_flagged(found):
    networks = EigenFunctions(1, 3)
    networks.load_state_dict(found.networks.state_dict())
    for parameter in networks.parameters():
        parameter.data[1] = parameter.data[0]
    networks.calibrate(found.inputs)
    twice = measure(networks.eval(), found.inputs, rbf())
    assert twice.off_diagonal[1] > 0.99
    assert twice.converged.tolist() == [True, False, True]


def test_eigenvalues_out_of_order_are_flagged(found):
    networks = EigenFunctions(1, 3)
    networks.load_state_dict(found.networks.state_dict())
    for parameter in networks.parameters():
        parameter.data = parameter.data.flip(0)
    networks.calibrate(found.inputs)
    assert measure(networks.eval(), found.inputs, rbf()).ordered.tolist() == [True, False, False]


def test_the_three_ways_to_give_a_kernel_train_alike():
    x = torch.randn(20, 2, dtype=torch.float64)
    drawn = torch.randn(15, 20, dtype=torch.float64)
    matrix = drawn.T @ drawn / 15
    settings = {"functions": 2, "steps": 5, "batch_size": 8, "progress": False}
    by_matrix, by_samples = fit(x, matrix, **settings), fit(x, kernel_samples=drawn, **settings)
    torch.testing.assert_close(by_matrix.functions, by_samples.functions, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(by_matrix.residual, by_samples.residual, rtol=1e-9, atol=1e-9)
    by_function = fit(x, rbf(), **settings)
    torch.testing.assert_close(by_function.functions, fit(x, rbf()(x, x), **settings).functions, rtol=1e-9, atol=1e-9)
    first, second = exact_spectrum(x, matrix, functions=5), exact_spectrum(x, kernel_samples=drawn, functions=5)
    torch.testing.assert_close(first.eigenvalues, second.eigenvalues, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((first.functions * second.functions).mean(0).abs(), torch.ones(5).double())


def test_a_fit_depends_on_its_seed_only_and_leaves_the_generator_alone():
    x = torch.randn(16, 1)
    state = torch.get_rng_state()
    one, two = (fit(x, rbf(), steps=3, batch_size=8, seed=3, progress=False).functions for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two)
    assert not torch.equal(one, fit(x, rbf(), steps=3, batch_size=8, seed=4, progress=False).functions)


def test_an_indefinite_kernel_is_noticed():
    with pytest.warns(UserWarning, match="not positive semi-definite"):
        fit(torch.randn(10, 1), -torch.eye(10), functions=2, steps=2, progress=False)


def test_networks_reload(found):
    networks = EigenFunctions(1, 3)
    networks.load_state_dict(found.networks.state_dict())
    assert torch.equal(networks.eval()(found.inputs), found.functions)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_pictures(tmp_path, dimensions):
    x = torch.randn(16, dimensions)
    result = fit(x, rbf(), functions=2, steps=5, progress=False)
    for number, exact in enumerate([None, exact_spectrum(x, rbf())]):
        draw(result, tmp_path / f"{number}.png", exact, "rbf")
        assert (tmp_path / f"{number}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InvalidInput, match="cannot be written"):
        draw(result, tmp_path / "missing" / "x.png")


# models


def bert(**options):
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = hf_attn.AttnBertConfig(**size, vocab_size=20, max_position_embeddings=16, **options)
    return hf_attn.AttnBertModel(config).eval().double()


IDS = torch.arange(12).view(2, 6) + 1
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("which", ["key", "query"])
def test_the_key_kernel_of_a_stock_model(which):
    model = bert()
    attention = model.encoder.layer[1].attention.self
    seen = {}
    handle = getattr(attention, which).register_forward_hook(lambda m, a, out: seen.update(out=out))
    model(IDS, attention_mask=MASK)
    handle.remove()
    given = attention_kernel(model, {"input_ids": IDS, "attention_mask": MASK}, layer=1, head=1, which=which)
    expected = seen["out"].view(2, 6, 2, 8)[:, :, 1][MASK.bool()]
    torch.testing.assert_close(given.inputs, expected.detach())
    matrix = given.kernel(given.inputs, given.inputs)
    torch.testing.assert_close(matrix, (expected @ expected.T / math.sqrt(8)).exp().detach())
    assert torch.linalg.eigvalsh(matrix).min() > -1e-10


def test_the_gram_kernel_is_that_of_the_attention_map():
    model = bert(attn_implementation="eager")
    batch = {"input_ids": IDS[1:], "attention_mask": MASK[1:]}
    weights = model(**batch, output_attentions=True).attentions[1][0, 0, :4, :4].detach()
    given = attention_kernel(model, batch, layer=1, head=0, which="gram")
    torch.testing.assert_close(given.kernel, weights.T @ weights)
    singular = torch.linalg.svdvals(weights)
    found = exact_spectrum(given.inputs, given.kernel)
    torch.testing.assert_close(found.eigenvalues * 4, singular.square())
    assert given.inputs.shape == (4, 16)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ({"which": "attention"}, InvalidOption, "not symmetric"),
        ({"which": "keys"}, InvalidOption, "did you mean 'key'"),
        ({"layer": 2}, InvalidInput, "layer 2 must be from 0 to 1"),
        ({"head": 2}, InvalidInput, "head 2 must be from 0 to 1"),
        ({"which": "gram"}, InvalidInput, "one sequence"),
    ],
)
def test_attention_refusals(call, error, match):
    with pytest.raises(error, match=match):
        attention_kernel(bert(), {"input_ids": IDS, "attention_mask": MASK}, **call)


def test_keys_whose_exponential_overflows_are_refused():
    model = bert().float()
    with torch.no_grad():
        model.encoder.layer[0].attention.self.key.weight.mul_(1e3)
    with pytest.raises(InvalidInput, match="overflows"):
        attention_kernel(model, {"input_ids": IDS})


def test_the_tangent_kernel_of_a_linear_model_is_known():
    model, x = torch.nn.Linear(3, 2, bias=False).double(), torch.randn(6, 3, dtype=torch.float64)
    drawn = ntk_samples(model, x, output=1, probes=4000, progress=False)
    # J J^T of one logit is X X^T; its estimate has a relative error of about sqrt(2 / 4000)
    torch.testing.assert_close(drawn.T @ drawn / 4000, x @ x.T, rtol=0, atol=0.1 * float((x @ x.T).diagonal().max()))


def test_a_projection_is_the_jacobian_times_its_probe():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    drawn = ntk_samples(model, x, probes=2, seed=7, progress=False)
    generator = torch.Generator().manual_seed(7)
    for row in drawn:
        probes = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in model.parameters()]
        for point, value in zip(x, row, strict=True):
            gradients = torch.autograd.grad(model(point[None]).sum(), list(model.parameters()))
            expected = sum((g * p).sum() for g, p in zip(gradients, probes, strict=True))
            torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def test_the_tangent_kernel_of_a_hugging_face_model():
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = hf_attn.AttnViTConfig(**size, image_size=4, patch_size=2, num_channels=1, num_labels=3)
    model = hf_attn.AttnViTForImageClassification(config).train()
    pixels = torch.randn(6, 1, 4, 4)
    drawn = ntk_samples(model, pixels, output=0, probes=3, progress=False)
    assert drawn.shape == (3, 6) and torch.isfinite(drawn).all() and model.training
    fit(pixels.flatten(1), kernel_samples=drawn, functions=2, steps=2, progress=False)
    with pytest.raises(InvalidInput, match="output 3"):
        ntk_samples(model, pixels, output=3, progress=False)
    with pytest.raises(InvalidInput, match="one number for each"):
        ntk_samples(model, pixels, output=lambda outputs: outputs.logits, progress=False)
    with pytest.raises(InvalidInput, match="probes 0"):
        ntk_samples(model, pixels, probes=0, progress=False)

"""Losses local to their step: one pass against whole logits and autograd (docs/method.md §5)."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokenratio.bregman import GENERATORS, make_generator
from tokenratio.losses import LOSSES
from tokenratio.statistics import Head, chunks, step_losses

METHODS = ["tbpo", "tbpo_a", "tbpo_q", "adpo"]
BETA = 0.7


def make_inputs(
    method="tbpo_a",
    steps=5,
    vocabulary=23,
    width=6,
    *,
    bias=True,
    tied=False,
    softcap=None,
    cached=False,
    dtype=torch.float64,
    seed=0,
    scale=1.0,
):
    """Arguments of `run`; what gradients flow to requires them."""
    rng = torch.Generator().manual_seed(seed)

    def random(*shape, grad=False):
        values = scale * torch.randn(shape, generator=rng, dtype=torch.float64)
        return values.to(dtype).requires_grad_(grad)

    inputs = {
        "hidden": random(2 * steps, width, grad=True),
        "weight": random(vocabulary, width, grad=True),
        "labels": torch.randint(vocabulary, (2 * steps,), generator=rng),
        "step_weight": torch.rand(steps, generator=rng, dtype=torch.float64),
        "logit_softcap": softcap,
        "with_kl": method == "tbpo_a",
    }
    if not cached or method == "tbpo_a":
        inputs["ref_hidden"] = random(2 * steps, width)
        if not tied:
            inputs["ref_weight"] = random(vocabulary, width)
    if cached:
        inputs["ref_log_probs"] = -random(2 * steps).abs()
    if bias:
        inputs["bias"] = random(vocabulary, grad=True)
    if method == "tbpo_q":
        inputs["log_state_weight"] = random(steps, grad=True)
    return inputs


def run(inputs, **options):
    """`step_losses` with the heads' tensors by name."""
    inputs = inputs | options
    softcap, ref_weight = inputs.pop("logit_softcap"), inputs.pop("ref_weight", None)
    head = Head(inputs.pop("weight"), inputs.pop("bias", None), softcap)
    ref_head = None if ref_weight is None else Head(ref_weight, None, softcap)
    return step_losses(head=head, ref_head=ref_head, **inputs)


def loss_of(method, generator="sba", label_smoothing=0.0, **params):
    settings = {"generator": make_generator(generator, **params)}
    settings |= {"beta": BETA, "label_smoothing": label_smoothing}
    return lambda steps: LOSSES[method].per_step(steps, **settings)


def cast(inputs, dtype):
    """The same values in another dtype, as fresh leaves."""
    return {
        name: value.detach().to(dtype).requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def evaluate(inputs, step_loss, impl="fused", chunk_size=None, upstream=1.0):
    """Every value and every gradient, by name."""
    losses = run(inputs, step_loss=step_loss, impl=impl, chunk_size=chunk_size)
    leaves = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    gradients = torch.autograd.grad(losses.total * upstream, list(leaves.values()))
    found = {
        "total": losses.total.detach(),
        "per_step": losses.per_step,
        "log_probs": losses.tokens.log_probs,
        "ref_log_probs": losses.tokens.ref_log_probs,
    }
    if losses.tokens.kl_ref_policy is not None:
        found["kl"] = losses.tokens.kl_ref_policy
    assert all(not value.requires_grad for value in found.values())
    return found | {f"d {k}": g for k, g in zip(leaves, gradients, strict=True)}


def assert_same(found, expected, *, case="", **tolerances):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, **tolerances, msg=lambda m, n=name: f"{n} {case}: {m}"
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("generator", "params"),
    [
        *((name, {}) for name in GENERATORS if name != "ba"),
        ("ba", {"lam": 0.5}),
        ("sba", {"lam": -0.5}),
    ],
)
def test_any_method_and_generator(method, generator, params):
    inputs = make_inputs(method, scale=0.6)
    step_loss = loss_of(method, generator, **params)
    expected = evaluate(inputs, step_loss, "reference")
    assert all(value.abs().max() > 0 for name, value in expected.items() if name != "d labels")
    assert_same(evaluate(inputs, step_loss, chunk_size=4), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("steps", "vocabulary", "width", "chunk_size"),
    [(1, 2, 1, None), (1, 23, 6, 1), (3, 31, 5, 2), (5, 23, 6, 3), (7, 129, 3, 6), (7, 64, 8, 100)],
)
def test_odd_sizes(method, steps, vocabulary, width, chunk_size):
    step_loss = loss_of(method, "logistic")
    for softcap, tied, bias in itertools.product((None, 1.5), (False, True), (False, True)):
        head = {"softcap": softcap, "tied": tied, "bias": bias}
        inputs = make_inputs(method, steps, vocabulary, width, **head)
        expected = evaluate(inputs, step_loss, "reference", upstream=-1.7)
        found = evaluate(inputs, step_loss, chunk_size=chunk_size, upstream=-1.7)
        assert_same(found, expected, case=head, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_smoothed_labels(method):
    inputs = make_inputs(method, scale=0.6)
    step_loss = loss_of(method, label_smoothing=0.2)
    expected = evaluate(inputs, step_loss, "reference")
    found = evaluate(inputs, step_loss, chunk_size=4)
    assert_same(found, expected, rtol=1e-10, atol=1e-12)
    clean = evaluate(inputs, loss_of(method), chunk_size=4)
    assert (clean["d hidden"] - found["d hidden"]).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_blocks_within_a_chunk(method, monkeypatch):
    monkeypatch.setattr(chunks, "_BLOCK_ELEMENTS", 50)
    inputs = make_inputs(method, steps=9)
    step_loss = loss_of(method)
    expected = evaluate(inputs, step_loss, "reference")
    assert_same(evaluate(inputs, step_loss), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_known_reference_log_probs(method):
    """They are used as given; the reference's logits are formed for the KL alone."""
    inputs = make_inputs(method, cached=True)
    step_loss = loss_of(method)
    expected = evaluate(inputs, step_loss, "reference")
    assert torch.equal(expected["ref_log_probs"], inputs["ref_log_probs"])
    assert_same(evaluate(inputs, step_loss, chunk_size=4), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_errs_no_more_than_the_reference(method, dtype, softcap):
    """Both at the working dtype, against float64 of the same rounded inputs."""
    low = cast(make_inputs(method, steps=11, vocabulary=257, softcap=softcap), dtype)
    step_loss = loss_of(method, "logistic")
    truth = evaluate(cast(low, torch.float64), step_loss, "reference")
    naive = evaluate(low, step_loss, "reference")
    fused = evaluate(low, step_loss, chunk_size=8)
    for name, exact in truth.items():
        allowed = (exact - naive[name]).abs()
        # Rounding of another order of summation, and of the result to its own dtype.
        step = torch.finfo(naive[name].dtype).eps * exact.abs()
        slack = step + 2e-6 * exact.abs().max().clamp_min(1)
        assert ((exact - fused[name]).abs() <= allowed + slack).all(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [80.0, -80.0, 300.0])
def test_finite_at_large_log_ratios(dtype, gap):
    """Policy and reference agree on no token: bounded generator, finite loss and gradient."""
    inputs = make_inputs("tbpo_a", bias=False, dtype=dtype)
    inputs["hidden"] = (gap * inputs["hidden"]).detach().requires_grad_()
    found = evaluate(inputs, loss_of("tbpo_a", "logistic"))
    assert all(value.isfinite().all() for value in found.values())
    assert found["kl"].max() > 30
    expected = evaluate(inputs, loss_of("tbpo_a", "logistic"), "reference")
    assert_same(found, expected, rtol=1e-4, atol=1e-5)


def test_kl_near_the_start_is_exact():
    """The policy a hair off the reference: the KL of 1e-7 has a relative error below 1e-4."""
    inputs = make_inputs("tbpo_a", steps=8, vocabulary=500, bias=False, tied=True)
    noise = torch.randn(
        inputs["hidden"].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    inputs["ref_hidden"] = inputs["hidden"].detach() + 3e-4 * noise
    truth = evaluate(inputs, loss_of("tbpo_a"), "reference")["kl"]
    assert truth.max() < 2e-6
    kl = evaluate(cast(inputs, torch.float32), loss_of("tbpo_a"))["kl"].double()
    # Against the same rounded inputs: casting hidden states of 1 loses 3e-4 of their difference.
    again = cast(cast(inputs, torch.float32), torch.float64)
    exact = evaluate(again, loss_of("tbpo_a"), "reference")["kl"]
    assert ((kl - exact).abs() <= 5e-3 * exact + 1e-12).all()


@pytest.mark.parametrize("method", METHODS)
def test_no_step_at_all(method):
    inputs = make_inputs(method, steps=0)
    found = evaluate(inputs, loss_of(method))
    assert found["total"] == 0
    assert all((value == 0).all() for name, value in found.items() if name.startswith("d "))


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",), ("hidden", "bias"), ()])
def test_only_what_is_asked_for_gets_a_gradient(frozen):
    inputs = make_inputs("tbpo_q")
    for name in frozen:
        inputs[name].requires_grad_(False)
    expected = evaluate(inputs, loss_of("tbpo_q"), "reference")
    assert_same(evaluate(inputs, loss_of("tbpo_q")), expected, rtol=1e-10, atol=1e-12)


class _Products(TorchDispatchMode):
    """Counts matrix products that have the vocabulary in their shape, and the largest tensor."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.count, self.largest = vocabulary, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        tensors = [a for a in (*args, result) if isinstance(a, torch.Tensor)]
        if name in ("mm", "addmm", "addmm_"):
            self.count += any(self.vocabulary in tensor.shape for tensor in tensors)
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize(
    ("method", "cached", "products"),
    [("tbpo_a", False, 4), ("tbpo_q", False, 4), ("tbpo_q", True, 3)],
)
def test_units_of_work(method, cached, products):
    """Four products forward and backward, three with a cached reference; no whole logits."""
    inputs = make_inputs(method, steps=64, vocabulary=211, width=4, cached=cached, bias=False)
    with _Products(211) as seen:
        evaluate(inputs, loss_of(method), chunk_size=16)
    assert seen.count == products * 2 * 64 // 16
    assert seen.largest <= 16 * 211


def test_no_gradient_work_under_no_grad():
    inputs = make_inputs(steps=4, vocabulary=211, bias=False)
    with torch.no_grad(), _Products(211) as seen:
        losses = run(inputs, step_loss=loss_of("tbpo_a"))
    assert seen.count == 2
    assert not losses.total.requires_grad


def test_backward_runs_once():
    inputs = make_inputs()
    total = run(inputs, step_loss=loss_of("tbpo_a")).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        total.backward()


def test_a_missing_part_of_the_gradient_would_be_seen():
    """The comparison above tells a detached KL, a shifted label and a forgotten β apart."""
    inputs = make_inputs()
    expected = evaluate(inputs, loss_of("tbpo_a"), "reference")

    def detached(steps):
        return loss_of("tbpo_a")(
            type(steps)(
                steps.chosen_log_ratio,
                steps.rejected_log_ratio,
                steps.chosen_kl.detach(),
                steps.rejected_kl.detach(),
            )
        )

    shifted = inputs | {"labels": inputs["labels"].roll(1)}
    swapped = inputs | {"step_weight": inputs["step_weight"].flip(0)}
    for wrong in (
        evaluate(inputs, detached),
        evaluate(shifted, loss_of("tbpo_a")),
        evaluate(swapped, loss_of("tbpo_a")),
        evaluate(inputs, loss_of("tbpo_a", "logistic")),
    ):
        assert (wrong["d hidden"] - expected["d hidden"]).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler, of torch
@pytest.mark.parametrize("method", ["tbpo_a", "tbpo_q"])
def test_compiled_elementwise_part(method, monkeypatch):
    """What a GPU runs, compiled here for the CPU."""
    inputs = make_inputs(method, steps=7, vocabulary=130, dtype=torch.float32)
    expected = evaluate(inputs, loss_of(method))
    monkeypatch.setattr(chunks, "_is_compiled", lambda tensor: True)
    for size in (None, 6):
        assert_same(
            evaluate(inputs, loss_of(method), chunk_size=size), expected, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_hidden": None, "ref_weight": None}, "ref_hidden"),
        ({"step_weight": torch.ones(3)}, "step_weight"),
        ({"log_state_weight": torch.ones(10)}, "log_state_weight"),
        ({"ref_log_probs": torch.ones(5)}, "ref_log_probs"),
        ({"logit_softcap": 0.0}, "logit_softcap"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"impl": "magic"}, "impl"),
    ],
)
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message):
        run(make_inputs() | change, step_loss=loss_of("tbpo_a"))


def test_odd_number_of_labels_is_refused():
    inputs = make_inputs(bias=False)
    for name in ("hidden", "labels", "ref_hidden"):
        inputs[name] = inputs[name][:-1]
    with pytest.raises(ValueError, match="steps of two"):
        run(inputs, step_loss=loss_of("tbpo_a"))


def test_every_local_method_is_covered():
    assert {name for name, method in LOSSES.items() if method.is_local} == set(METHODS)

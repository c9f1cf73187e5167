"""The fused statistics against the readable ones, and both against float64 truth.

docs/method.md §5.
"""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tokenratio.statistics import head, token_statistics
from tokenratio.statistics.reference import kl_terms

DTYPES = [torch.float32, torch.float64]


def make_inputs(
    tokens=7,
    vocabulary=23,
    width=5,
    *,
    bias=True,
    tied=False,
    seed=0,
    dtype=torch.float64,
    scale=1.0,
    ref_width=None,
):
    """Random arguments of `token_statistics`; the policy's tensors require gradients."""
    rng = torch.Generator().manual_seed(seed)

    def random(*shape, grad=False):
        values = scale * torch.randn(shape, generator=rng, dtype=torch.float64)
        return values.to(dtype).requires_grad_(grad)

    ref_width = width if tied or ref_width is None else ref_width
    inputs = {
        "hidden": random(tokens, width, grad=True),
        "weight": random(vocabulary, width, grad=True),
        "labels": torch.randint(vocabulary, (tokens,), generator=rng),
        "ref_hidden": random(tokens, ref_width),
    }
    if not tied:
        inputs["ref_weight"] = random(vocabulary, ref_width)
    if bias:
        inputs["bias"] = random(vocabulary, grad=True)
        if not tied:
            inputs["ref_bias"] = random(vocabulary)
    return inputs


def cast(inputs, dtype):
    """The same values in another dtype, as fresh leaves."""
    return {
        name: value.detach().to(dtype).requires_grad_(value.requires_grad)
        if value.is_floating_point()
        else value
        for name, value in inputs.items()
    }


def outputs_of(statistics):
    return [
        value
        for value in (statistics.log_probs, statistics.ref_log_probs, statistics.kl_ref_policy)
        if value is not None
    ]


def values_and_gradients(inputs, *, use=("log_probs", "kl_ref_policy"), seed=1, **options):
    """Outputs, and the gradients of a random weighting of them in every tensor that wants one."""
    statistics = token_statistics(**inputs, **options)
    rng = torch.Generator().manual_seed(seed)
    loss = 0.0
    for name in use:
        value = getattr(statistics, name)
        if value is not None:
            weight = torch.randn(value.shape, generator=rng, dtype=torch.float64)
            loss = loss + (weight.to(value.dtype) * value).sum()
    leaves = [v for v in inputs.values() if v.requires_grad]
    gradients = torch.autograd.grad(loss, leaves)
    return outputs_of(statistics), list(gradients)


def assert_fused_is_reference(inputs, chunk_size=None, **options):
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-5}[inputs["hidden"].dtype]
    expected = values_and_gradients(inputs, impl="reference", **options)
    actual = values_and_gradients(inputs, impl="fused", chunk_size=chunk_size, **options)
    for ours, theirs in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def by_hand(inputs, softcap=None):
    """One token at a time, from the definition."""
    log_probs, ref_log_probs, kls = [], [], []
    ref_weight = inputs.get("ref_weight", inputs["weight"])
    ref_bias = inputs.get("ref_bias", None if "ref_weight" in inputs else inputs.get("bias"))
    for token, label in enumerate(inputs["labels"].tolist()):
        logits = [
            hidden[token] @ weight.T + (0 if bias is None else bias)
            for hidden, weight, bias in (
                (inputs["hidden"], inputs["weight"], inputs.get("bias")),
                (inputs["ref_hidden"], ref_weight, ref_bias),
            )
        ]
        if softcap is not None:
            logits = [softcap * (z / softcap).tanh() for z in logits]
        log_p, log_ref = (z - z.exp().sum().log() for z in logits)
        log_probs.append(log_p[label])
        ref_log_probs.append(log_ref[label])
        kls.append((log_ref.exp() * (log_ref - log_p)).sum())
    return [torch.stack(values) for values in (log_probs, ref_log_probs, kls)]


each_impl = pytest.mark.parametrize("impl", ["fused", "reference"])


@each_impl
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("tied", [False, True])
def test_definition(impl, softcap, tied):
    inputs = make_inputs(tied=tied)
    statistics = token_statistics(**inputs, logit_softcap=softcap, with_kl=True, impl=impl)
    for ours, expected in zip(outputs_of(statistics), by_hand(inputs, softcap), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert (statistics.kl_ref_policy > 0).all()


@settings(deadline=None, derandomize=True)
@given(
    tokens=st.sampled_from([0, 1, 2, 7]),
    vocabulary=st.sampled_from([1, 2, 23]),
    chunk_size=st.sampled_from([None, 1, 5, 100]),
    bias=st.booleans(),
    tied=st.booleans(),
    softcap=st.sampled_from([None, 0.7, 30.0]),
    with_kl=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10),
)
def test_fused_is_reference(
    tokens, vocabulary, chunk_size, bias, tied, softcap, with_kl, dtype, seed
):
    inputs = make_inputs(tokens, vocabulary, bias=bias, tied=tied, seed=seed, dtype=dtype)
    assert_fused_is_reference(inputs, chunk_size, logit_softcap=softcap, with_kl=with_kl)


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 7, 8])
@pytest.mark.parametrize(
    "use", [("log_probs",), ("kl_ref_policy",), ("log_probs", "kl_ref_policy")]
)
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_any_of_the_outputs_may_be_used(chunk_size, use, softcap):
    options = {"use": use, "logit_softcap": softcap, "with_kl": True}
    assert_fused_is_reference(make_inputs(ref_width=3), chunk_size, **options)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_each_gradient_alone_and_the_others_without_it(frozen):
    inputs = make_inputs()
    inputs[frozen] = inputs[frozen].detach()
    assert_fused_is_reference(inputs, 3, with_kl=True)
    for name in ("hidden", "weight", "bias"):
        inputs[name] = inputs[name].detach().requires_grad_(name == frozen)
    assert_fused_is_reference(inputs, 3, with_kl=True)


@each_impl
def test_without_a_reference(impl):
    inputs = make_inputs()
    expected = by_hand(inputs)[0]
    for name in ("ref_hidden", "ref_weight", "ref_bias"):
        del inputs[name]
    statistics = token_statistics(**inputs, impl=impl)
    assert statistics.ref_log_probs is None
    assert statistics.kl_ref_policy is None
    torch.testing.assert_close(statistics.log_probs, expected)
    assert_fused_is_reference(inputs, 2)


@each_impl
def test_the_reference_is_a_constant(impl):
    """No gradient reaches the reference, the tied head included."""
    inputs = make_inputs(tied=True)
    inputs["ref_hidden"].requires_grad_()
    statistics = token_statistics(**inputs, with_kl=True, impl=impl)
    assert not statistics.ref_log_probs.requires_grad
    loss = statistics.log_probs.sum() + statistics.kl_ref_policy.sum()
    assert torch.autograd.grad(loss, inputs["ref_hidden"], allow_unused=True) == (None,)
    # The tied head's gradient is that of the policy's use of it alone.
    inputs["ref_hidden"].requires_grad_(False)
    untied = inputs | {"ref_weight": inputs["weight"].detach(), "ref_bias": inputs["bias"].detach()}
    (_, tied_gradients), (_, gradients) = (
        values_and_gradients(each, with_kl=True, impl=impl) for each in (inputs, untied)
    )
    for ours, theirs in zip(tied_gradients, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@each_impl
def test_gradient_where_some_log_probabilities_are_equal(impl):
    """d = 0 in a few entries, as after the first steps: the KL's gradient is still p − p_ref."""
    logits = torch.tensor([[0.3, -0.7, 1.1, 0.2]], dtype=torch.float64, requires_grad=True)
    ref_logits = logits.detach()[:, [1, 0, 2, 3]]
    head = torch.eye(4, dtype=torch.float64)
    label = torch.tensor([0])
    statistics = token_statistics(logits, head, label, ref_logits, head, with_kl=True, impl=impl)
    (gradient,) = torch.autograd.grad(statistics.kl_ref_policy.sum(), logits)
    expected = (logits.softmax(-1) - ref_logits.softmax(-1)).detach()
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(softcap):
    inputs = make_inputs(4, 6, 3)

    def function(hidden, weight, bias):
        changed = dict(inputs, hidden=hidden, weight=weight, bias=bias)
        statistics = token_statistics(**changed, logit_softcap=softcap, with_kl=True, chunk_size=3)
        return statistics.log_probs, statistics.kl_ref_policy

    assert torch.autograd.gradcheck(function, (inputs["hidden"], inputs["weight"], inputs["bias"]))


def test_second_derivatives_are_refused_in_words():
    inputs = make_inputs()
    loss = token_statistics(**inputs).log_probs.square().sum()
    (gradient,) = torch.autograd.grad(loss, inputs["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("chunk_size", [1, 16, None])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("near_start", [True, False])
def test_low_precision_is_no_worse_than_the_reference(chunk_size, softcap, near_start):
    """At bfloat16 the fused values and gradients err no more than the naive ones."""
    inputs = cast(make_inputs(64, 101, 32, seed=3, scale=0.5), torch.bfloat16)
    if near_start:
        noise = torch.randn(64, 32, generator=torch.Generator().manual_seed(4))
        reference = (inputs["hidden"].detach().float() + 1e-2 * noise).bfloat16()
        inputs |= {"ref_hidden": reference, "ref_weight": inputs["weight"].detach()}
        inputs["ref_bias"] = inputs["bias"].detach()
    options = {"with_kl": True, "logit_softcap": softcap}
    truth = values_and_gradients(cast(inputs, torch.float64), impl="reference", **options)
    naive = values_and_gradients(inputs, impl="reference", **options)
    fused = values_and_gradients(inputs, impl="fused", chunk_size=chunk_size, **options)
    for exact, low_reference, low_fused in zip(
        *(itertools.chain(*result) for result in (truth, naive, fused)), strict=True
    ):
        assert low_reference.dtype == low_fused.dtype
        # Half a unit of the output's own precision: both round the same number, maybe differently.
        tolerance = torch.finfo(low_fused.dtype).eps * exact.abs() + 1e-5
        assert ((exact - low_fused).abs() <= (exact - low_reference).abs() + tolerance).all()


@each_impl
def test_logits_are_not_rounded_to_bfloat16(impl):
    """bfloat16 inputs give what the same numbers in float64 give, to float32 rounding."""
    inputs = cast(make_inputs(32, 50, 64, scale=0.5), torch.bfloat16)
    exact = token_statistics(**cast(inputs, torch.float64), with_kl=True, impl="reference")
    statistics = token_statistics(**inputs, with_kl=True, impl=impl)
    for ours, truth in zip(outputs_of(statistics), outputs_of(exact), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=[False, True], ids=["float32 CPU", "bfloat16 CPU"])
def cpu_multiplies_bfloat16(request, monkeypatch):
    monkeypatch.setattr(head, "multiplies_bfloat16", lambda device: request.param)
    return request.param


@each_impl
def test_autocast_changes_no_value(impl, cpu_multiplies_bfloat16):
    """And no gradient, where bfloat16 is not faster."""
    inputs = make_inputs(dtype=torch.float32)
    leaves = [inputs["hidden"], inputs["weight"], inputs["bias"]]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            statistics = token_statistics(**inputs, with_kl=True, impl=impl)
        loss = statistics.log_probs.sum() + statistics.kl_ref_policy.sum()
        results.append([*outputs_of(statistics), *torch.autograd.grad(loss, leaves)])
    tolerance = {"rtol": 0, "atol": 0}
    for index, (outside, inside) in enumerate(zip(*results, strict=True)):
        assert inside.dtype == torch.float32
        if cpu_multiplies_bfloat16 and impl == "fused" and index == 3:  # the states' gradient
            assert not torch.equal(inside, outside)
        else:
            torch.testing.assert_close(inside, outside, **tolerance)


def test_backward_is_the_same_within_autocast(cpu_multiplies_bfloat16):
    """It usually runs outside, after a forward pass within."""
    inputs = make_inputs(dtype=torch.float32)
    leaves = [inputs["hidden"], inputs["weight"], inputs["bias"]]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            statistics = token_statistics(**inputs, with_kl=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = statistics.log_probs.sum() + statistics.kl_ref_policy.sum()
            results.append(torch.autograd.grad(loss, leaves))
    for outside, inside in zip(*results, strict=True):
        torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def plain_autocast(inputs, softcap):
    """What anyone writes: logits from `F.linear` under autocast, everything else in float32."""
    with torch.autocast("cpu", torch.bfloat16):
        logits, ref_logits = (
            torch.nn.functional.linear(inputs[states], inputs["weight"], inputs["bias"]).float()
            for states in ("hidden", "ref_hidden")
        )
    if softcap is not None:
        logits, ref_logits = (softcap * (z / softcap).tanh() for z in (logits, ref_logits))
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1).detach()
    labels = inputs["labels"][:, None]
    log_probs, ref_log_probs = (x.gather(1, labels).squeeze(1) for x in (log_p, log_q))
    return log_probs, ref_log_probs, kl_terms(log_p, log_q).sum(-1)


@pytest.mark.parametrize(("distance", "better"), [(1e-3, 100), (0.03, 10), (0.3, 2)])
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_one_head_under_autocast_errs_less_than_plain_autocast(
    distance, better, softcap, cpu_multiplies_bfloat16
):
    """Policy and reference have one head, as with LoRA; both against float64 of the same inputs.

    Log-ratios (up to 0.01, 0.3 and 3 nats) and KL are `better` times as accurate, gradients no
    worse.
    """
    inputs = make_inputs(40, 501, 64, tied=True, dtype=torch.float32, scale=0.5)
    noise = torch.randn(40, 64, generator=torch.Generator().manual_seed(5))
    inputs["ref_hidden"] = inputs["hidden"].detach() + distance * noise
    leaves = [inputs["hidden"], inputs["weight"], inputs["bias"]]

    def results(outputs, leaves):
        log_probs, ref_log_probs, kl = outputs
        gradients = torch.autograd.grad((3 * log_probs + kl).sum(), leaves)
        return [log_probs - ref_log_probs, kl, *gradients]

    exact = cast(inputs, torch.float64)
    options = {"with_kl": True, "logit_softcap": softcap, "chunk_size": 16}
    truth = results(
        outputs_of(token_statistics(**exact, **options)),
        [exact["hidden"], exact["weight"], exact["bias"]],
    )
    naive = results(plain_autocast(inputs, softcap), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = outputs_of(token_statistics(**inputs, **options))
    ours = results(outputs, leaves)
    for index, (true, theirs, mine) in enumerate(zip(truth, naive, ours, strict=True)):
        factor = better if index < 2 else 1
        assert factor * (mine - true).norm() <= (theirs - true).norm(), index


def test_one_head_under_autocast_gives_equal_states_a_log_ratio_of_zero(cpu_multiplies_bfloat16):
    inputs = make_inputs(tied=True, dtype=torch.float32)
    inputs["ref_hidden"] = inputs["hidden"].detach().clone()
    with torch.autocast("cpu", torch.bfloat16):
        statistics = token_statistics(**inputs, with_kl=True)
    assert torch.equal(statistics.log_probs, statistics.ref_log_probs)
    assert not statistics.kl_ref_policy.any()


@each_impl
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *DTYPES], ids=str)
def test_dtypes(impl, dtype):
    inputs = cast(make_inputs(), dtype)
    (log_probs, ref_log_probs, kl), gradients = values_and_gradients(
        inputs, with_kl=True, impl=impl
    )
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert log_probs.dtype == ref_log_probs.dtype == kl.dtype == expected
    assert all(gradient.dtype == dtype for gradient in gradients)


@each_impl
def test_without_gradients(impl):
    inputs = make_inputs()
    expected = outputs_of(token_statistics(**inputs, with_kl=True, impl=impl))
    with torch.no_grad():
        statistics = token_statistics(**inputs, with_kl=True, impl=impl)
    for ours, theirs in zip(outputs_of(statistics), expected, strict=True):
        assert not ours.requires_grad
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=0)


@each_impl
def test_tiny_kl_is_accurate_in_float32(impl):
    """At a KL of 3e-6 the sum of p_ref·d cancels; ours stays within 1e-3 of float64.

    docs/method.md §5.
    """
    tokens, vocabulary, width = 64, 5000, 16
    rng = torch.Generator().manual_seed(0)
    hidden, weight, noise = (
        torch.randn(shape, generator=rng)
        for shape in ((tokens, width), (vocabulary, width), (tokens, width))
    )
    hidden = hidden / 2
    moved = hidden + 6e-4 * noise
    labels = torch.zeros(tokens, dtype=torch.long)
    inputs = {"hidden": moved, "weight": weight, "labels": labels, "ref_hidden": hidden}
    truth = token_statistics(**cast(inputs, torch.float64), with_kl=True).kl_ref_policy
    assert 2e-6 < truth.median() < 4e-6
    log_p, log_ref = ((h @ weight.T).log_softmax(-1) for h in (moved, hidden))
    naive = (log_ref.exp() * (log_ref - log_p)).sum(-1)

    def worst(kl):
        return ((kl.double() - truth) / truth).abs().max()

    ours = token_statistics(**inputs, with_kl=True, impl=impl).kl_ref_policy
    assert (ours > 0).all()
    assert worst(ours) < 1e-3
    assert worst(naive) > 100 * worst(ours)


@each_impl
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(impl, dtype):
    """±200: probabilities underflow, nothing overflows, and the KL and its gradient are right."""
    logits = torch.tensor(
        [[200.0, -200.0, 0.0], [-200.0, 200.0, 0.0], [200.0, -200.0, 0.0]], dtype=dtype
    ).requires_grad_()
    ref_logits = torch.tensor(
        [[-200.0, 200.0, 0.0], [-200.0, 200.0, 0.0], [0.0, 0.0, 0.0]], dtype=dtype
    )
    head, labels = torch.eye(3, dtype=dtype), torch.tensor([1, 1, 1])
    statistics = token_statistics(logits, head, labels, ref_logits, head, with_kl=True, impl=impl)
    expected = torch.tensor([400.0, 0.0, 200 - torch.tensor(3.0).log()], dtype=dtype)
    torch.testing.assert_close(statistics.kl_ref_policy, expected, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(
        statistics.log_probs, torch.tensor([-400.0, 0.0, -400.0], dtype=dtype)
    )
    (gradient,) = torch.autograd.grad(statistics.kl_ref_policy.sum(), logits)
    difference = (logits.softmax(-1) - ref_logits.softmax(-1)).detach()
    torch.testing.assert_close(gradient, difference)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_fused_never_holds_the_logits():
    tokens, vocabulary, width, chunk_size = 96, 64, 4, 8
    inputs = make_inputs(tokens, vocabulary, width)
    largest = {}
    for impl in ("fused", "reference"):
        with LargestTensor() as mode:
            statistics = token_statistics(
                **inputs,
                with_kl=True,
                logit_softcap=3.0,
                impl=impl,
                chunk_size=chunk_size if impl == "fused" else None,
            )
            (statistics.log_probs.sum() + statistics.kl_ref_policy.sum()).backward()
        largest[impl] = mode.numel
    assert largest["reference"] >= tokens * vocabulary
    assert largest["fused"] == max(chunk_size * vocabulary, tokens * width)


def test_fused_saves_no_logits():
    """What stays alive between forward and backward is inputs and vectors over tokens."""
    inputs = make_inputs(96, 64, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        token_statistics(**inputs, with_kl=True)
    assert saved
    assert max(tensor.numel() for tensor in saved) == 96 * 4


@each_impl
@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"ref_hidden": None, "ref_weight": None, "ref_bias": None}, {"with_kl": True}, "with_kl"),
        ({"ref_hidden": None}, {}, "need ref_hidden"),
        ({"labels": torch.zeros(6, dtype=torch.long)}, {}, "hidden must be"),
        ({"labels": torch.zeros(7, 1, dtype=torch.long)}, {}, "hidden must be"),
        ({"hidden": torch.zeros(1, 7, 5)}, {}, "hidden must be"),
        ({"weight": torch.zeros(23, 4)}, {}, "weight must be"),
        ({"bias": torch.zeros(22)}, {}, "bias that goes with weight"),
        ({"bias": torch.zeros(1)}, {}, "bias that goes with weight"),
        ({"ref_bias": torch.zeros(22)}, {}, "bias that goes with ref_weight"),
        ({"ref_hidden": torch.zeros(6, 5)}, {}, "ref_hidden must be"),
        ({"ref_weight": torch.zeros(23, 4)}, {}, "ref_weight must be"),
        ({"ref_weight": torch.zeros(24, 5), "ref_bias": None}, {"with_kl": True}, "vocabulary"),
        ({}, {"logit_softcap": 0.0}, "logit_softcap"),
        ({}, {"logit_softcap": float("nan")}, "logit_softcap"),
        ({}, {"chunk_size": 0}, "chunk_size"),
    ],
)
def test_value_errors(impl, changes, options, message):
    inputs = make_inputs(dtype=torch.float32) | changes
    with pytest.raises(ValueError, match=message):
        token_statistics(**inputs, **options, impl=impl)


def test_unknown_implementation():
    with pytest.raises(ValueError, match="impl"):
        token_statistics(**make_inputs(), impl="triton")


@pytest.mark.parametrize("beta", [0.1, 0.7])
@each_impl
def test_advantage_score_from_raw_logits(beta, impl):
    """A(s,a) = β[(z_θ − z_ref)(a) − E_ref(z_θ − z_ref)], values and gradients (docs/method.md §10).

    Catches a detached or reversed KL and K3: the identity has no logarithm and no KL in it.
    """
    inputs = make_inputs()
    statistics = token_statistics(**inputs, with_kl=True, impl=impl)
    log_ratio = statistics.log_probs - statistics.ref_log_probs
    score = beta * (log_ratio + statistics.kl_ref_policy)

    logits = inputs["hidden"] @ inputs["weight"].T + inputs["bias"]
    ref_logits = inputs["ref_hidden"] @ inputs["ref_weight"].T + inputs["ref_bias"]
    difference = logits - ref_logits
    mean = (ref_logits.softmax(-1) * difference).sum(-1)
    expected = beta * (difference.gather(1, inputs["labels"][:, None]).squeeze(1) - mean)

    torch.testing.assert_close(score, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn(7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    leaves = [inputs["hidden"], inputs["weight"], inputs["bias"]]
    for ours, theirs in zip(
        *(torch.autograd.grad(values @ weights, leaves) for values in (score, expected)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)

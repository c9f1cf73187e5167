"""What a step needs on several GPUs: memory of each, arithmetic and communication."""

from tokenratio.training.memory import (
    GRADIENTS,
    OPTIMIZER,
    POLICY,
    REFERENCE,
    TEMPORARIES,
    Batch,
    Parts,
    Shapes,
)

SHARDINGS = ("DDP", "ZeRO-2", "FSDP2", "ZeRO-3")
# `reduce_bucket_size` of DeepSpeed: gradients on their way to the process that keeps them.
_BUCKET_ELEMENTS = 5e8


def sharded(
    parts: Parts, shapes: Shapes, batch: Batch, sharding: str, gpus: int
) -> dict[str, float]:
    """One process's share of what a process alone would hold at the same moment of a step.

    FSDP2 keeps float32 weights and gathers them, layer by layer, in the dtype that is multiplied;
    gradients stay whole until the last batch of a step. DeepSpeed's weights have that dtype,
    float32 ones are the optimizer's; gradients are reduced after every batch.
    """
    compute, trainable = batch.compute_bytes, shapes.trainable
    if gpus == 1:
        return dict(parts)
    if sharding == "DDP":
        return {**parts, "DDP's gradient buckets": 4 * trainable}
    share = {OPTIMIZER: 1 / gpus, TEMPORARIES: 1 / gpus}
    added: dict[str, float] = {}
    if sharding == "FSDP2":
        share |= {POLICY: 1 / gpus, REFERENCE: 1 / gpus}
        share[GRADIENTS] = 1.0 if batch.accumulates else 1 / gpus
    else:
        narrow = min(1.0, compute / batch.weight_bytes)
        whole = 1 / gpus if sharding == "ZeRO-3" else 1.0
        share |= {POLICY: narrow * whole, GRADIENTS: (compute + 4) / 4 / gpus}
        share[REFERENCE] = narrow / gpus if sharding == "ZeRO-3" else 1.0
        added["float32 weights of the optimizer"] = 4 * trainable / gpus * (compute < 4)
        added["DeepSpeed's gradient bucket"] = compute * _BUCKET_ELEMENTS
    if sharding != "ZeRO-2":
        layers = min(compute, batch.weight_bytes) * 2 * shapes.layer  # in use, and the next
        heads = compute * shapes.head * (2 - shapes.is_tied + batch.reference_copy)
        gradient = compute * shapes.layer * (shapes.adapter is None)
        added["gathered weights, and a layer's gradient"] = layers + heads + gradient
    return {name: size * share.get(name, 1.0) for name, size in parts.items()} | added


def flops(shapes: Shapes, batch: Batch) -> float:
    """Floating-point operations of one batch: products and attention of both models, head, loss.

    The backward pass of a matrix takes two products, or one if it is frozen. Causal attention is
    counted over half of the positions.
    """
    tokens, full = batch.tokens, shapes.adapter is None
    body = 2 * shapes.layers * shapes.layer * tokens
    attention = 2 * shapes.layers * batch.length * shapes.query * tokens
    adapter = 0 if shapes.adapter is None else 2 * shapes.adapter.parameters * tokens
    forward = body + attention
    # Computing again stops at the last tensor kept: before the MLP's last product if that trains.
    last = 2 * shapes.layers * shapes.hidden * shapes.intermediate * tokens * full
    policy = forward + adapter + (forward + adapter - last) * batch.checkpointing
    backward = body * (1 + full) + 2 * (attention + adapter)
    # Logits of each model, the states' gradient, the head's; logits again if not in one pass.
    products = 2 + batch.reference_forward + full + (not batch.one_pass)
    head = 2 * shapes.head * batch.scored * products
    return policy + backward + forward * batch.reference_forward + head


def traffic(shapes: Shapes, batch: Batch, sharding: str, gpus: int, accumulation: int) -> float:
    """Bytes that each GPU sends in one step of `accumulation` batches."""
    compute, trainable = batch.compute_bytes, shapes.trainable
    gathered = min(compute, batch.weight_bytes) * shapes.parameters
    gathered *= accumulation * (2 + batch.reference_forward)  # forward, backward; reference
    sent = {
        "DDP": 2 * 4 * trainable,
        "ZeRO-2": (accumulation + 1) * compute * trainable,
        "FSDP2": gathered + 4 * trainable,
        "ZeRO-3": gathered + accumulation * compute * trainable,
    }
    return sent[sharding] * (gpus - 1) / gpus

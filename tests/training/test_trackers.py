"""Trackers get what metrics.jsonl gets, through the Trainer; TensorBoard needs no account."""

import json
import struct

import pytest

from training.short_runs import trainer_in


def scalars(folder):
    """What a run's event files hold: `{(tag, step): value}`."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        data, begin = path.read_bytes(), 0
        while begin < len(data):  # length, its checksum, an event, its checksum
            (length,) = struct.unpack_from("<Q", data, begin)
            event = Event.FromString(data[begin + 12 : begin + 12 + length])
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found[value.tag, event.step] = value.simple_value
            begin += length + 16
    return found


def test_tensorboard_gets_every_metric(tmp_path):
    pytest.importorskip("tensorboardX")
    trainer = trainer_in(tmp_path, "tbpo_q", report_to=["tensorboard"], save_strategy="no")
    trainer.train()
    found, num = scalars(tmp_path), 0
    for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()):
        for name, value in line.items():
            if name == "step":
                continue
            is_held_out = name.startswith("eval_")
            tag = f"eval/{name.removeprefix('eval_')}" if is_held_out else f"train/{name}"
            assert found[tag, line["step"]] == pytest.approx(value, rel=1e-6), name
            num += 1
    assert num > 100
    assert ("train/rewards/margins", 1) in found
    assert ("eval/rewards/accuracies", 3) in found

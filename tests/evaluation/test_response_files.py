"""The file of generations: killed anywhere, resumed, and nothing asked for twice."""

import errno
import json
import os
import subprocess
import sys
import textwrap

import pytest

from evaluation.loopback import KEY, Loopback, first_times, run_and_kill
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.backends import EndpointBackend, TransformersBackend
from tokenratio.evaluation.endpoint import Endpoint, EndpointSettings
from tokenratio.evaluation.journal import read_settings, settings_digest
from tokenratio.evaluation.json_lines import parse_lines, to_line
from tokenratio.evaluation.response_files import (
    AnsweredPrompt,
    dataset_responses,
    read_responses,
    write_responses,
)
from tokenratio.models import processes
from tokenratio.models.processes import Group
from tokenratio.models.response import Response

SETTINGS = {"model": "m", "temperature": 1.0}
PROMPTS = [(f"p:{i}", f"prompt {i}") for i in range(6)]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


class Backend:
    """Answers in any order, and remembers what it was asked."""

    def __init__(self, *, stop_after=None, reverse=True):
        self.asked, self.stop_after, self.reverse = [], stop_after, reverse

    def __call__(self, prompts):
        for number, (id, prompt) in enumerate(reversed(prompts) if self.reverse else prompts):
            if number == self.stop_after:
                raise TokenRatioError("the backend is tired")
            self.asked.append(id)
            yield (
                id,
                [
                    Response(f"{prompt} é\u2028", "eos", (1, 2)),
                    Response("", "length"),
                ],
            )


def write(path, backend=None, prompts=PROMPTS, settings=SETTINGS):
    said = []
    backend = backend or Backend()
    return write_responses(prompts, backend, path, settings, report=said.append), backend, said


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "new" / "generations.jsonl"
    written, backend, said = write(path)
    assert backend.asked == [id for id, _ in reversed(PROMPTS)]
    assert said == []
    assert read_responses(path) == written
    assert [generation.id for generation in written] == [id for id, _ in PROMPTS]
    digest = settings_digest(SETTINGS)
    assert json.loads(path.read_text(encoding="utf-8").split("\n")[0]) == {
        "id": "p:0",
        "prompt": "prompt 0",
        "samples": [
            {"text": "prompt 0 é\u2028", "token_ids": [1, 2], "finish_reason": "eos"},
            {"text": "", "token_ids": None, "finish_reason": "length"},
        ],
        "settings": digest,
    }
    assert read_settings(path) == {digest: SETTINGS}
    assert sorted(os.listdir(path.parent)) == ["generations.jsonl", "generations.settings.json"]


def test_every_line_is_on_the_disk_before_the_next_is_asked_for(tmp_path):
    path, sizes = tmp_path / "g.jsonl", []

    def backend(prompts):
        for id, _ in prompts:
            sizes.append(path.read_bytes().count(b"\n"))
            yield id, [Response("x", "eos")]

    write(path, backend)
    assert sizes == [0, 1, 2, 3, 4, 5]


def test_a_file_cut_off_at_any_byte_is_gone_on_with(tmp_path):
    path = tmp_path / "g.jsonl"
    first, _, _ = write(path, Backend(reverse=False))
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == 10]
    for cut in [0, *range(ends[1] - 2, ends[2] + 3, 7), ends[1], len(whole) - 1, len(whole)]:
        path.write_bytes(whole[:cut])
        kept = sum(end <= cut for end in ends)
        again, backend, said = write(path)
        assert again == first
        assert path.read_bytes() == whole
        assert sorted(backend.asked) == [id for id, _ in PROMPTS[kept:]]
        torn = cut not in (0, *ends)
        assert sum("cut off" in text for text in said) == torn
        assert sum(f"{kept} of 6 prompts are already answered" in text for text in said) == (
            kept > 0
        )


def part_of(path, index, content):
    path.with_name(f"{path.name}.process-{index}.part").write_bytes(content)


def test_what_other_processes_wrote_is_not_asked_for_again(tmp_path):
    """Three processes were killed: one cut off in a line, one while its part was moved."""
    path = tmp_path / "g.jsonl"
    first, _, _ = write(path, Backend(reverse=False))
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1])
    part_of(path, 1, lines[1] + lines[3])
    part_of(path, 12, lines[5] + lines[2][:-9])
    again, backend, said = write(path)
    assert (again, path.read_bytes()) == (first, whole)
    assert backend.asked == ["p:4", "p:2"]
    assert [text.split(": ")[1] for text in said] == [
        "the last line was cut off and has been dropped",
        "4 of 6 prompts are already answered",
    ]
    assert sorted(os.listdir(tmp_path)) == ["g.jsonl", "g.settings.json"]


def test_parts_of_another_run_are_refused_or_overwritten(tmp_path):
    path = tmp_path / "g.jsonl"
    write(path, settings={"model": "other"})
    content = path.read_bytes()
    path.write_bytes(b"")
    part_of(path, 1, content)
    with pytest.raises(TokenRatioError, match=r"process-1\.part was made with other settings"):
        write(path)
    assert path.with_name("g.jsonl.process-1.part").read_bytes() == content
    write_responses(PROMPTS, Backend(), path, SETTINGS, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["g.jsonl", "g.settings.json"]
    part_of(path, 1, b"mine\n")
    content = path.read_bytes()
    with pytest.raises(TokenRatioError, match=r"process-1\.part already exists and was not"):
        write_responses(PROMPTS, Backend(), path, SETTINGS, overwrite=True)
    assert path.read_bytes() == content


def test_files_of_the_users_own_beside_a_file_stay(tmp_path):
    """As `split` names them, which writes lines of ours."""
    path = tmp_path / "g.jsonl"
    write(path)
    names = ["g.jsonl.part-aa", "g.jsonl.part-10", "g.jsonl.process-01.part", "g.jsonl.part"]
    for name in names:
        path.with_name(name).write_bytes(path.read_bytes())
    write(path)
    write_responses(PROMPTS, Backend(), path, SETTINGS, overwrite=True)
    assert {*names} <= {*os.listdir(tmp_path)}


@pytest.mark.parametrize("rank", [0, 1])
def test_every_process_refuses_other_settings_before_a_file_is_touched(tmp_path, monkeypatch, rank):
    path = tmp_path / "g.jsonl"
    write(path)
    content = path.read_bytes()
    settings = [SETTINGS, {"model": "other", "temperature": 1.0}]
    monkeypatch.setattr(Group, "gather", lambda self, own: settings)
    monkeypatch.setattr(Group, "on_first", lambda self, work: work())
    monkeypatch.setattr(processes, "_current", Group(rank, 2))
    with pytest.raises(TokenRatioError, match=r"^rank 1 would write .* \(model 'm', now 'other'\)"):
        write_responses(PROMPTS, Backend(), path, settings[rank], overwrite=True)
    assert path.read_bytes() == content


def test_a_server_is_asked_by_one_process(monkeypatch):
    monkeypatch.setattr(processes, "_current", Group(0, 2))
    endpoint = Endpoint(EndpointSettings(base_url="http://localhost:1/v1", model="m"))
    with pytest.raises(TokenRatioError, match="asked by one process"):
        EndpointBackend(endpoint, max_new_tokens=3)


def test_a_backend_that_gives_up_loses_nothing(tmp_path):
    path = tmp_path / "g.jsonl"
    with pytest.raises(TokenRatioError, match=r"is tired\. .*has 4 of 6 prompts answered"):
        write(path, Backend(stop_after=4))
    again, backend, _ = write(path)
    assert backend.asked == ["p:1", "p:0"]
    assert read_responses(path) == again
    _, backend, _ = write(path)
    assert backend.asked == []


def test_a_full_disk_says_what_is_kept(tmp_path, monkeypatch):
    path, whole = tmp_path / "g.jsonl", os.write

    def write_some(file, content):
        if b"p:3" in bytes(content)[:20]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(file, content)

    monkeypatch.setattr(os, "write", write_some)
    kept = r"^the disk is full: free space\. .*g\.jsonl has 3 of 6 prompts answered: run the same"
    with pytest.raises(TokenRatioError, match=kept):
        write(path, Backend(reverse=False))


def test_a_file_with_parts_beside_it_is_not_read(tmp_path):
    path = tmp_path / "g.jsonl"
    write(path)
    part_of(path, 1, b"")
    with pytest.raises(TokenRatioError, match=r"not finished, there is g\.jsonl\.process-1"):
        read_responses(path)
    write(path)
    assert len(read_responses(path)) == len(PROMPTS)


def test_a_backend_that_leaves_prompts_out_is_found_out(tmp_path):
    with pytest.raises(TokenRatioError, match="left out 2 prompts: p:4, p:5"):
        write(tmp_path / "g.jsonl", lambda prompts: Backend(reverse=False)(prompts[:4]))


def test_more_prompts_are_added_to_a_file(tmp_path):
    path = tmp_path / "g.jsonl"
    write(path, prompts=PROMPTS[3:])
    _, backend, _ = write(path)
    assert backend.asked == ["p:2", "p:1", "p:0"]
    assert [generation.id for generation in read_responses(path)] == [id for id, _ in PROMPTS]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"settings": SETTINGS | {"temperature": 0.5}}, r"other settings \(temperature 1.0, now 0"),
        ({"settings": {"model": "m"}}, r"\(temperature 1.0, now not set\)"),
        ({"prompts": PROMPTS[:-1]}, "p:5 is not among the 5 prompts"),
        ({"prompts": [("p:0", "another"), *PROMPTS[1:]]}, "p:0 has changed since"),
        ({"prompts": [*PROMPTS, PROMPTS[0]]}, "two prompts have the id p:0"),
    ],
)
def test_another_run_is_refused_in_words(tmp_path, changed, said):
    path = tmp_path / "g.jsonl"
    write(path)
    before = path.read_bytes(), path.with_suffix(".settings.json").read_bytes()
    with pytest.raises(TokenRatioError, match=said):
        write(path, **changed)
    assert before == (path.read_bytes(), path.with_suffix(".settings.json").read_bytes())
    path.with_suffix(".settings.json").unlink()
    if "settings" in changed:
        with pytest.raises(TokenRatioError, match="made with other settings: use those"):
            write(path, **changed)


def test_two_processes_do_not_write_one_file(tmp_path):
    path = tmp_path / "g.jsonl"

    def backend(prompts):
        with pytest.raises(TokenRatioError, match="written by another process"):
            write(path)
        yield from Backend()(prompts)

    write(path, backend)
    write(path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("oops", "g.jsonl:2: not a JSON object, and not the last"),
        ("[1]", "g.jsonl:2: not a JSON object"),
        ('{"text": "x"}', "g.jsonl:2: no field 'id'; this is not a file of generations"),
        ('{"id": "a", "prompt": "b", "samples": []}', "g.jsonl:2: no samples"),
        (
            '{"id": "a", "prompt": "b", "samples": [{"text": 1}]}',
            r"g.jsonl:2: samples\[0\].text is 1, not a string",
        ),
        (
            '{"id": "a", "prompt": "b", "samples": [{"text": "", "token_ids": [1.5]}]}',
            r"g.jsonl:2: samples\[0\].token_ids\[0\] is 1.5, not a whole number",
        ),
    ],
)
def test_damage_is_named_by_its_line(tmp_path, line, said):
    path = tmp_path / "g.jsonl"
    write(path)
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[1] = line
    path.write_text("\n".join(lines), encoding="utf-8")
    for read in (read_responses, write):
        with pytest.raises(TokenRatioError, match=said):
            read(path)


def test_unfinished_and_missing_files_are_not_read(tmp_path):
    path = tmp_path / "g.jsonl"
    with pytest.raises(TokenRatioError, match=r"cannot read .*g\.jsonl"):
        read_responses(path)
    write(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(TokenRatioError, match=r"g\.jsonl:6: the last line is cut off"):
        read_responses(path)
    path.write_bytes(b"")
    with pytest.raises(TokenRatioError, match="holds no generations"):
        read_responses(path)
    assert read_settings(tmp_path / "nothing.jsonl") == {}


def test_half_a_surrogate_pair_is_kept(tmp_path):
    line = {"text": "\ud83d é"}
    assert parse_lines(to_line(line), tmp_path) == ([line], len(to_line(line)))


def test_references_pair_with_prompts(tmp_path):
    rows = [
        {"prompt": "a", "chosen": " b", "rejected": "c"},
        {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "x", "content": "r"}]},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    first, second = dataset_responses(str(path))
    assert first == AnsweredPrompt("pairs.jsonl:1", "a", (Response(" b", "eos"),), first.settings)
    assert second.samples[0].text == "r"
    with pytest.raises(TokenRatioError, match=r"pairs\.jsonl:2: column rejected is neither"):
        dataset_responses(str(path), column="rejected")
    world = dataset_responses("world:reviews?pairs=3&seed=1")
    assert len(world) == 3


def test_the_transformers_backend_goes_on_with_the_samples_it_would_have_had(
    make_policy, tokenizer, world, tmp_path
):
    prompts = [(f"w:{i}", prompt) for i, prompt in enumerate(world.prompts(9, seed=0))]

    def backend(**options):
        return TransformersBackend(
            make_policy(0), tokenizer, max_new_tokens=12, num_samples=2, seed=3, **options
        )

    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    settings = backend().settings()
    assert "batch_size" not in settings
    write_responses(prompts, backend(), whole, settings, report=print)
    write_responses(prompts[4:7], backend(batch_size=1), part, settings, report=print)
    write_responses(prompts, backend(batch_size=3), part, settings, report=print)
    assert part.read_bytes() == whole.read_bytes()
    sample = read_responses(whole)[0].samples[0]
    assert tokenizer.decode(sample.token_ids, skip_special_tokens=True) == sample.text


def endpoint_backend(url, *, report=print, **overrides):
    quick = {"concurrency": 4, "timeout": 5.0, "backoff": 0.001, "max_backoff": 0.01}
    endpoint = Endpoint(EndpointSettings(url, "tiny", **quick | overrides), report=report)
    return EndpointBackend(endpoint, max_new_tokens=20, num_samples=2, seed=1)


def test_a_rough_endpoint_answers_everything_once(tmp_path):
    """Each prompt meets one fault after the other before it is answered."""
    faults = [429, "reset", 500, "garbled", "hang"]

    def fault(prompt, times):
        kind = int(prompt.split()[-1]) % 6
        return faults[times] if times < kind else None

    prompts = [(f"p:{i}", f"prompt {i}") for i in range(12)]
    with Loopback(fault=fault) as server:
        backend = endpoint_backend(server.url, timeout=0.4)
        written = write_responses(prompts, backend, tmp_path / "g.jsonl", backend.settings())
    assert read_responses(tmp_path / "g.jsonl") == written
    assert [generation.id for generation in written] == [id for id, _ in prompts]
    assert {len(generation.samples) for generation in written} == {2}
    assert len({sample.text for generation in written for sample in generation.samples}) == 24
    assert server.asked == {f"prompt {i}": i % 6 + 1 for i in range(12)}
    assert set(server.answered.values()) == {1}
    assert KEY not in json.dumps(read_settings(tmp_path / "g.jsonl"))


def test_a_prompt_that_the_endpoint_refuses_is_named_and_the_rest_kept(tmp_path):
    def fault(prompt, times):
        return (400, {}, "too long") if prompt == "prompt 2" else None

    path = tmp_path / "g.jsonl"
    with Loopback(fault=fault) as server:
        backend = endpoint_backend(server.url)
        with pytest.raises(
            TokenRatioError, match=r"1 prompts got no answer, first p:2: .*too long"
        ):
            write_responses(PROMPTS, backend, path, backend.settings())
        assert path.read_bytes().count(b"\n") == 5
        server.fault = first_times(None, 0)
        write_responses(PROMPTS, backend, path, backend.settings())
    assert server.asked == {f"prompt {i}": 2 if i == 2 else 1 for i in range(6)}


SCRIPT = """
    import sys
    from tokenratio.evaluation.backends import EndpointBackend
    from tokenratio.evaluation.endpoint import Endpoint, EndpointSettings
    from tokenratio.evaluation.response_files import write_responses

    endpoint = Endpoint(EndpointSettings(sys.argv[1], "tiny", concurrency=4, backoff=0.001))
    backend = EndpointBackend(endpoint, max_new_tokens=20, num_samples=2, seed=1)
    prompts = [(f"p:{i}", f"prompt {i}") for i in range(60)]
    write_responses(prompts, backend, sys.argv[2], backend.settings())
"""


@pytest.mark.slow
def test_killed_in_the_middle_and_resumed_nothing_is_paid_twice(tmp_path):
    """But what was under way when the process died, which nobody can know of."""
    path = tmp_path / "g.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT)]
    with Loopback(delay=0.01) as server:
        answered = run_and_kill([*command, server.url, str(path)], server, answers=20)
        lines, _ = parse_lines(path.read_bytes(), path)
        assert 20 <= answered < 60
        assert answered - 4 <= len(lines) <= answered
        result = subprocess.run(
            [*command, server.url, str(path)], capture_output=True, text=True, check=True
        )
    assert f"{len(lines)} of 60 prompts are already answered" in result.stdout
    assert f"{60 - len(lines)} requests to tiny" in result.stdout
    generations = read_responses(path)
    assert [generation.id for generation in generations] == [f"p:{i}" for i in range(60)]
    kept = {line["prompt"] for line in lines}
    assert all(server.asked[prompt] == 1 for prompt in kept)
    assert max(server.asked.values()) <= 2
    assert sum(count == 2 for count in server.asked.values()) <= 4

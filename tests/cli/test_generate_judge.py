"""`generate` and `judge` as a user runs them, on tiny models and against a server that fails."""

import json
import re
from dataclasses import fields
from operator import eq, gt, lt
from pathlib import Path

import pytest

from evaluation.loopback import KEY, Loopback, first_times
from tiny import tiny_model, tiny_tokenizer, word_pairs
from tokenratio.cli.main import main
from tokenratio.data.worlds import WORLDS
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.journal import read_settings
from tokenratio.evaluation.judges.prompt_templates import TEMPLATES
from tokenratio.evaluation.judges.registry import JUDGES, judge_settings
from tokenratio.evaluation.response_files import read_responses
from tokenratio.evaluation.verdict_files import read_judgements

NUM = 6
QUICK = ["--backoff", "0.001", "--max_backoff", "0.01", "--timeout", "5"]
WORLD = f"world:reviews?pairs={NUM}&seed=3"


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def pairs():
    """A file of pairs, every prompt another."""
    rows = [
        {**row, "prompt": f"{row['prompt']} {'ash ' * i}"} for i, row in enumerate(word_pairs(NUM))
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


@pytest.fixture
def policy():
    tiny_model().save_pretrained("policy")
    tiny_tokenizer().save_pretrained("policy")
    return "policy"


def write_generations(path, texts, digest="0" * 16):
    rows = [
        {
            "id": f"pairs.jsonl:{i + 1}",
            "prompt": row["prompt"],
            "samples": [{"text": t, "token_ids": None, "finish_reason": "eos"} for t in texts(row)],
            "settings": digest,
        }
        for i, row in enumerate(map(json.loads, Path("pairs.jsonl").read_text().splitlines()))
    ]
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def sides(pairs):
    write_generations("ours.jsonl", lambda row: [row["chosen"]], "a" * 16)
    write_generations("theirs.jsonl", lambda row: [row["rejected"]], "b" * 16)
    return pairs


def run(capsys, *argv, code=0):
    """What the command printed: its output, or its one line of error."""
    found = main([str(word) for word in argv])
    printed = capsys.readouterr()
    assert found == code, printed.err or printed.out
    if code:
        assert printed.err.count("\n") == 1
        assert "Traceback" not in printed.err
    assert KEY not in printed.out + printed.err
    return printed.err if code else printed.out


def files():
    found = Path().rglob("*")
    return {str(p): p.read_bytes() for p in found if p.is_file() and p.suffix != ".sqlite"}


# generate


def generate(name, *more):
    return ["generate", name, "--prompts", "pairs.jsonl", "--max_new_tokens", "5", *more]


def test_generate_goes_on_and_leaves_what_is_done(pairs, policy, capsys):
    printed = run(capsys, *generate(policy, "--num_samples", "2"))
    assert re.search(r"12 responses to 6 prompts in generations.jsonl; \d+ cut at", printed)
    whole = files()
    tokens = sum(len(s.token_ids) for g in read_responses("generations.jsonl") for s in g.samples)
    assert re.search(rf"; {tokens} tokens in \d+\.\d s \([\d,]+/s\)", printed)
    (settings,) = read_settings("generations.jsonl").values()
    assert settings["model"] == policy
    assert settings["num_samples"] == 2
    assert not {"output", "num_prompts", "batch_size", "overwrite"} & settings.keys()

    printed = run(capsys, *generate(policy, "--num_samples", "2", "--batch_size", "1"))
    assert "6 of 6 prompts are already answered" in printed
    assert "tokens in" not in printed
    assert files() == whole

    lines = Path("generations.jsonl").read_text().splitlines(keepends=True)
    Path("generations.jsonl").write_text("".join(lines[:2]) + lines[2][:10])
    printed = run(capsys, *generate(policy, "--num_samples", "2", "--batch_size", "1"))
    assert "the last line was cut off and has been dropped" in printed
    assert "2 of 6 prompts are already answered" in printed
    assert files() == whole


def test_more_prompts_are_added_and_other_settings_refused(pairs, policy, capsys):
    run(capsys, *generate(policy, "--num_prompts", "2"))
    assert "2 of 6" in run(capsys, *generate(policy))
    whole = files()
    printed = run(capsys, *generate(policy, "--seed", "1"), code=2)
    assert "made with other settings (seed 0, now 1)" in printed
    assert "overwrite" in printed
    assert files() == whole
    run(capsys, *generate(policy, "--seed", "1", "--overwrite"))
    assert files() != whole
    run(capsys, *generate(policy, "--overwrite"))
    assert files() == whole


def test_a_model_trained_again_in_its_folder_is_another(pairs, policy, capsys):
    run(capsys, *generate(policy))
    tiny_model(seed=1).save_pretrained(policy)
    assert "other settings (weights" in run(capsys, *generate(policy), code=2)


@pytest.mark.parametrize("content", ['{"learning_rate": 1}', "[1, 2]", "hello", "a\nb\n", "\x00"])
def test_a_file_of_another_kind_is_never_written(content, pairs, policy, capsys):
    """Not even one that looks like a line that was cut off."""
    Path("notes.json").write_text(content)
    for more in ([], ["--overwrite"]):
        printed = run(capsys, *generate(policy, "--output", "notes.json", *more), code=2)
        assert "was not written by tokenratio" in printed
    assert Path("notes.json").read_text() == content
    assert not Path("notes.settings.json").exists()


def test_generate_from_an_endpoint(pairs, capsys):
    limited = (429, {"Retry-After": "0"}, None)
    unlucky = pairs[0]["prompt"]
    with Loopback(fault=lambda q, n: limited if q == unlucky and n == 0 else None) as server:
        argv = generate("tiny", "--endpoint", server.url, "--num_samples", "2", *QUICK)
        argv += ["--price_in", "1", "--price_out", "2"]
        printed = run(capsys, *argv)
        assert printed.index("6 requests to tiny at") < printed.index("6 answers to 7 requests")
        assert "at most about" in printed
        assert "12 responses to 6 prompts" in printed
        assert server.asked == {r["prompt"]: 2 if r["prompt"] == unlucky else 1 for r in pairs}
        assert {body["model"] for body in server.bodies} == {"tiny"}
        assert all(body["max_tokens"] == 5 and body["n"] == 2 for body in server.bodies)
        assert server.keys == {f"Bearer {KEY}"}
        whole, asked = files(), server.asked.total()
        assert KEY.encode() not in b"".join(whole.values())
        assert "requests to" not in run(capsys, *argv)
        assert "other settings (seed 0, now None)" in run(capsys, *argv, "--seed", "null", code=2)
        assert server.asked.total() == asked
        assert files() == whole
        run(capsys, *argv, "--seed", "null", "--overwrite")
        assert "seed" not in server.bodies[-1]
    texts = [sample.text for sample in read_responses("generations.jsonl")[1].samples]
    assert texts == [f"answer {i} to {pairs[1]['prompt']}" for i in range(2)]


def test_generation_stops_within_the_budget_and_goes_on(pairs, capsys):
    with Loopback() as server:
        argv = generate("tiny", "--endpoint", server.url, "--concurrency", "1", *QUICK)
        printed = run(capsys, *argv, "--max_requests", "2", code=2)
        assert "max_requests" in printed
        assert "2 of 6 prompts answered" in printed
        run(capsys, *argv)
        assert set(server.asked.values()) == {1}


def test_a_refused_key_is_said_without_the_key(pairs, monkeypatch, capsys):
    repeats = (401, {}, f"Incorrect API key provided: {KEY}")
    with Loopback(fault=lambda *_: repeats) as server:
        argv = generate("tiny", "--endpoint", server.url, *QUICK)
        assert "OPENAI_API_KEY holds a key that it does not" in run(capsys, *argv, code=2)
    monkeypatch.delenv("OTHER_KEY", raising=False)
    with Loopback(fault=lambda *_: 401) as server:
        argv = generate("tiny", "--endpoint", server.url, "--api_key_env", "OTHER_KEY", *QUICK)
        assert "OTHER_KEY is not set" in run(capsys, *argv, code=2)


# judge


def judge(name, *more, ours="ours.jsonl", theirs="theirs.jsonl"):
    return ["judge", ours, "--against", theirs, "--judge", name, *more]


def summary(path="judgements.summary.json"):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def asks_llm(server, *more, **sides):
    argv = ["--base_url", server.url, "--model", "tiny", "--cache", "cache.sqlite", *QUICK, *more]
    return judge("llm", *argv, **sides)


def asks_nobody(*more):
    return judge("llm", "--base_url", "http://x/v1", "--model", "x", *more)


def prefers(words):
    """A judge's answers: the response among `words` is better; it reads what the template asks."""

    def reply(question, number):
        first = re.search(r"-- response A \w+ -----\n(.*?)\n-----", question, re.S).group(1)
        return "Compared.\n" + ("[[A]]" if first in words else "[[B]]")

    return reply


def test_gold_against_a_column_of_a_world(capsys):
    """The pairs of a world, as if the policy had answered with the rejected response."""
    from tokenratio.data.worlds import world_rows

    rows = world_rows(WORLD)
    lines = [
        {
            "id": f"train_dataset:{i}",
            "prompt": row["prompt"],
            "samples": [{"text": row["rejected"], "finish_reason": "eos"}],
            "settings": "hand",
        }
        for i, row in enumerate(rows)
    ]
    Path("ours.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reward = WORLDS["reviews"].gold_reward
    rewards = [(reward(row["rejected"]), reward(row["chosen"])) for row in rows]
    printed = run(capsys, *judge("gold", theirs=WORLD))
    figures = summary()
    shares = [sum(test(a, b) for a, b in rewards) / NUM for test in (gt, eq, lt)]
    assert [figures["win_rate"][name] for name in ("win", "tie", "lose")] == shares
    assert figures["win_rate"]["win_rate"] == pytest.approx(shares[0] + shares[1] / 2)
    assert figures["win_rate"]["flip_rate"] is None
    assert figures["settings"]["theirs"] == {"source": WORLD, "split": None, "column": "chosen"}
    assert figures["mean_length"]["ours"]["words"] == pytest.approx(
        sum(len(row["rejected"].split()) for row in rows) / NUM
    )
    assert f"win {100 * shares[0]:.1f} % / tie" in printed
    assert "position flips" not in printed

    run(capsys, *judge("gold", "--column", "rejected", "--output", "same.jsonl", theirs=WORLD))
    assert summary("same.summary.json")["win_rate"]["tie"] == 1
    printed = run(capsys, *judge("gold", "--column", "rejected", theirs=WORLD), code=2)
    assert "made with other settings" in printed
    assert summary() == figures
    run(capsys, *judge("gold", "--column", "rejected", "--overwrite", theirs=WORLD))
    assert summary()["win_rate"]["tie"] == 1
    argv = judge("gold", "--num_prompts", "2", "--output", "few.jsonl", theirs=WORLD)
    run(capsys, *argv)
    assert summary("few.summary.json")["win_rate"]["num_prompts"] == 2


def test_generated_pairs_with_the_source_of_its_prompts(pairs, policy, capsys):
    """Ids and prompts that `generate` wrote are those of the data set's own responses."""
    run(capsys, *generate(policy, "--num_samples", "2", "--num_prompts", "4"))
    argv = judge("gold", "--world", "reviews", ours="generations.jsonl", theirs="pairs.jsonl")
    assert "answered on one side only" in run(capsys, *argv, code=2)
    run(capsys, *argv, "--num_prompts", "4")
    found = read_judgements("judgements.jsonl")
    assert [(j.id, j.sample) for j in found] == [
        (f"pairs.jsonl:{i}", number) for i in range(1, 5) for number in range(2)
    ]
    assert [j.characters_b for j in found[::2]] == [len(row["chosen"]) for row in pairs[:4]]
    assert summary()["win_rate"]["num_comparisons"] == 8


def test_llm_asks_both_orders_once_and_survives_faults(sides, capsys):
    ours = {row["chosen"] for row in sides[:4]}  # prefers ours on four prompts, else the second
    garbled = sides[0]["chosen"]
    answer = prefers(ours)

    def reply(question, number):
        return "I like [[A]] and [[B]]" if garbled_first(question) else answer(question, number)

    def garbled_first(question):
        return re.search(rf"response A \w+ -----\n{garbled}\n-----", question)

    with Loopback(reply, fault=first_times((429, {"Retry-After": "0"}, None), 1)) as server:
        argv = asks_llm(server, "--template", "hh-helpful", "--price_in", "1", "--price_out", "1")
        printed = run(capsys, *argv)
        assert printed.index("12 requests to tiny at") < printed.index("12 answers to 24 requests")
        whole, asked = files(), server.asked.total()
        assert asked == 24
        assert set(server.answered.values()) == {1}
        assert KEY.encode() not in b"".join(whole.values()) + Path("cache.sqlite").read_bytes()

        again = run(capsys, *argv)
        assert "6 of 6 comparisons are already judged" in again
        assert files() == whole
        # without the judgements, and the other way round: the answers are in the cache
        for output, order in (
            ("again.jsonl", {}),
            ("swapped.jsonl", {"ours": "theirs.jsonl", "theirs": "ours.jsonl"}),
        ):
            argv = asks_llm(server, "--template", "hh-helpful", "--output", output, **order)
            assert "requests to" not in run(capsys, *argv)
        argv = asks_llm(server, "--template", "tldr")
        assert "(template 'hh-helpful', now 'tldr'" in run(capsys, *argv, code=2)
        assert server.asked.total() == asked
    figures = summary()
    rate = figures["win_rate"]
    assert figures["unparsed"] == {
        "verdicts": 1,
        "comparisons": 1,
        "reasons": {"more than one verdict in the answer": 1},
    }
    assert rate["num_comparisons"] == 5
    assert [rate[name] for name in ("win", "tie", "lose")] == [3 / 5, 2 / 5, 0]
    assert rate["flip_rate"] == 2 / 5
    assert "position flips 40.0 %" in printed
    assert "verdicts missing: 1; comparisons left out: 1" in printed
    assert (
        f"length-controlled win rate {100 * figures['length_controlled']['win_rate']:.1f} ±"
        in printed
    )
    assert summary("again.summary.json") | {"settings": None} == figures | {"settings": None}
    assert_mirrored(figures, summary("swapped.summary.json"))


@pytest.mark.parametrize(
    "dress",
    [
        "<think>\n[[A]]? No, [[B]]!\n</think>\n\nCompared.\n{}",
        "Compared.\n\n**{}**",
        "Compared.\n\nFinal verdict: {}",
        'Compared.\n\n"{}."',
    ],
)
def test_a_plain_verdict_is_read_however_it_is_dressed(sides, capsys, dress):
    answer = prefers({row["chosen"] for row in sides})

    def reply(question, number):
        return dress.format(answer(question, number).splitlines()[-1])

    with Loopback(reply) as server:
        printed = run(capsys, *asks_llm(server, "--max_tokens", "4096"))
        assert {body["max_tokens"] for body in server.bodies} == {4096}
    assert "verdicts missing: 0; comparisons left out: 0" in printed
    assert summary()["win_rate"]["win"] == 1


def assert_mirrored(one, other):
    rate, mirrored = one["win_rate"], other["win_rate"]
    assert (rate["win"], rate["tie"], rate["lose"]) == (
        mirrored["lose"],
        mirrored["tie"],
        mirrored["win"],
    )
    assert rate["win_rate"] + mirrored["win_rate"] == 1
    low, high = mirrored["interval"]
    assert rate["interval"] == pytest.approx([1 - high, 1 - low], abs=1e-15)
    for name in ("standard_error", "flip_rate", "num_comparisons", "num_prompts"):
        assert rate[name] == mirrored[name]
    assert one["unparsed"]["verdicts"] == other["unparsed"]["verdicts"]
    one_length, other_length = one["length_controlled"], other["length_controlled"]
    assert one_length["win_rate"] + other_length["win_rate"] == pytest.approx(1, abs=1e-6)
    assert one_length["standard_error"] == pytest.approx(other_length["standard_error"], rel=1e-4)
    assert one["mean_length"]["ours"] == other["mean_length"]["theirs"]


def test_judging_stops_within_the_budget_and_goes_on(sides, capsys):
    with Loopback(prefers({row["chosen"] for row in sides})) as server:
        printed = run(
            capsys, *asks_llm(server, "--max_requests", "5", "--concurrency", "1"), code=2
        )
        assert "max_requests" in printed
        assert "2 of 6 comparisons judged" in printed
        run(capsys, *asks_llm(server))
        assert set(server.asked.values()) == {1}
        assert len(server.asked) == 12
    assert summary()["win_rate"]["win"] == 1


def test_implicit_and_reward_model(sides, policy, capsys):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tiny_model(seed=1).save_pretrained("start")
    tiny_tokenizer().save_pretrained("start")
    config = AutoConfig.from_pretrained(policy, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained("reward")
    tiny_tokenizer().save_pretrained("reward")
    capsys.readouterr()
    implicit = ["--policy", policy, "--reference", "start", "--beta", "0.5"]
    for name, flags in (("implicit", implicit), ("reward-model", ["--model", "reward"])):
        run(capsys, *judge(name, *flags, "--output", f"{name}.jsonl"))
        prob = [judgement.probability for judgement in read_judgements(f"{name}.jsonl")]
        assert len(set(prob)) == NUM
        swapped = {"ours": "theirs.jsonl", "theirs": "ours.jsonl"}
        run(capsys, *judge(name, *flags, "--output", "swapped.jsonl", "--overwrite", **swapped))
        assert_mirrored(summary(f"{name}.summary.json"), summary("swapped.summary.json"))
    printed = run(
        capsys, *judge("implicit", *implicit[:-1], "1", "--output", "implicit.jsonl"), code=2
    )
    assert "(beta 0.5, now 1.0)" in printed


def test_a_sheet_for_people_there_and_back(sides, capsys):
    argv = judge("human", "--sheet", "sheet.jsonl")
    what_to_do = 'set each verdict to "1", "2" or "tie", then run the same command again'
    assert f"sheet.jsonl: written; {what_to_do}" in run(capsys, *argv)
    said = f"sheet.jsonl: no verdict is filled in yet; {what_to_do}"
    assert run(capsys, *argv).strip().endswith(said)
    assert not Path("judgements.jsonl").exists()
    lines = [json.loads(line) for line in Path("sheet.jsonl").read_text().splitlines()]
    ours = {row["chosen"] for row in sides}
    for num in (2, 6):  # some of it, then the rest
        hands = ["ours"] * 3 + ["tie", "theirs", None]
        for line, hand in zip(lines[:num], hands[:num], strict=True):
            first = line["response_1"] in ours
            line["verdict"] = {"ours": "12"[not first], "theirs": "12"[first]}.get(hand, hand)
        Path("sheet.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        run(capsys, *argv, code=0 if num == 2 else 2)
    assert "other settings (verdicts" in run(capsys, *argv, code=2)
    printed = run(capsys, *argv, "--overwrite")
    rate = summary()["win_rate"]
    assert [rate[name] for name in ("win", "tie", "lose")] == [3 / 5, 1 / 5, 1 / 5]
    assert summary()["unparsed"]["reasons"] == {"not filled in": 1}
    assert "position flips" not in printed
    whole = files()
    run(capsys, *argv)
    assert files() == whole


def test_one_prompt_and_equal_gaps_have_no_error_and_no_length_control(sides, capsys):
    write_generations("theirs.jsonl", lambda row: [row["chosen"] + " ash"], "b" * 16)
    run(capsys, *judge("gold", "--world", "reviews"))
    assert summary()["length_controlled"]["win_rate"] is None
    assert "shorter by 4" in summary()["length_controlled"]["reason"]
    argv = judge("gold", "--world", "reviews", "--num_prompts", "1", "--output", "one.jsonl")
    assert "one prompt: no standard error" in run(capsys, *argv)
    assert summary("one.summary.json")["win_rate"]["standard_error"] is None


def test_inputs_are_never_written_over(sides, capsys):
    whole = files()
    for output in ("ours.jsonl", "theirs.jsonl", "ours.json", "./theirs.txt"):
        argv = judge("gold", "--world", "reviews", "--output", output, "--overwrite")
        assert "would replace" in run(capsys, *argv, code=2)
    argv = judge("human", "--sheet", "sheet.jsonl", "--output", "sheet.jsonl")
    assert "would replace" in run(capsys, *argv, code=2)
    assert files() == whole


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["judge"], "needs one file of generations"),
        (["judge", "ours.jsonl"], "judge needs --against"),
        (["judge", "ours.jsonl", "--against", "theirs.jsonl"], "judge needs --judge"),
        (judge("golden"), "unknown judge 'golden'; did you mean 'gold'?"),
        (judge("gold"), "judge gold needs world"),
        (judge("gold", "--world", "x"), "no world 'x'"),
        (judge("implicit"), "judge implicit needs policy"),
        (judge("llm", "--model", "x"), "judge llm needs base_url"),
        (judge("gold", "--model", "x"), "applies only to judge reward-model and llm, not to gold"),
        (judge("human", "--max_cost", "1"), "--max_cost applies only to judge llm, not to human"),
        (
            judge("gold", "--batch_size", "2"),
            "reward-model and implicit, not to gold",
        ),
        (judge("gold", "--world", "reviews", "--split", "test"), "is a file of generations"),
        (judge("gold", "--world", "reviews", theirs="none.jsonl"), "none.jsonl"),
        (judge("gold", "--world", "reviews", ours="none.jsonl"), "none.jsonl"),
        (judge("gold", "--world", "reviews", ours="pairs.jsonl"), "not a file of generations"),
        (judge("gold", "--world", "reviews", "--column", "x", theirs="pairs.jsonl"), "column x"),
        (judge("gold", "--world", "reviews", "--column", "x"), "column x"),
        (judge("gold", "--num_prompts", "0"), "num_prompts must be at least 1"),
        (judge("llm", "--base_url", "localhost", "--model", "x"), "base_url must be an http"),
        (asks_nobody("--api_key_env", KEY), "not the key itself"),
        (asks_nobody("--max_tokens_name", "x"), "max_tokens_name must be"),
        (asks_nobody("--max_tokens", "0"), "max_tokens must be at least 1"),
        (asks_nobody("--template", "y"), "template must be one of mt-bench, "),
        (judge("llm", "--endpoint", "http://x/v1"), "use base_url, as in a recipe"),
        (judge("reward-model", "--reward_model", "x"), "use model, as in a recipe"),
        (generate("x", "--max_cost", "1"), "--max_cost applies only to endpoints: give --endpoint"),
        (
            generate("x", "--endpoint", "http://x", "--batch_size", "1"),
            "only to local models",
        ),
        (generate("x", "--endpoint", "http://x", "--max_cost", "1"), "max_cost needs price_in"),
        (
            generate("x", "--endpoint", "http://x", "--extra_body", "5"),
            "extra_body must be a mapping",
        ),
        (generate("x", "--seed", "null"), "seed null applies only to endpoints"),
        (generate("./none"), "cannot load ./none: there is no such folder"),
    ],
)
def test_a_users_mistake_is_one_line_and_writes_nothing(argv, message, sides, capsys):
    whole = files()
    assert message in run(capsys, *argv, code=2)
    assert files() == whole


@pytest.mark.parametrize("kind", JUDGES)
def test_a_judges_flags_are_the_settings_of_a_recipe(kind, capsys):
    """One dataclass is read by both, and its settings are described in both helps."""
    needed = dict.fromkeys(JUDGES[kind].required, "http://x/v1")
    settings = judge_settings("own-name", {"judge": kind, **needed})
    printed = run(capsys, "judge", "--help")
    for field in fields(settings):
        assert f"--{field.name}" in printed
        assert field.metadata["help"]
    with pytest.raises(TokenRatioError, match="unknown key in judge own-name 'spelt_wrong'"):
        judge_settings("own-name", {"judge": kind, "spelt_wrong": 1})


def test_help_lists_every_judge_and_template(capsys):
    printed = run(capsys, "judge", "--help")
    for name in ("gold", "reward-model", "implicit", "llm", "human", *TEMPLATES):
        assert name in printed


def test_another_template_or_end_is_another_way_of_reading(pairs, policy, capsys):
    run(capsys, *generate(policy))
    path = Path(policy) / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token_id": [2, 5]}))
    assert "made with other settings (reading" in run(capsys, *generate(policy), code=2)
    path.write_text(json.dumps(config))
    run(capsys, *generate(policy))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(policy)
    assert "made with other settings (reading" in run(capsys, *generate(policy), code=2)


def test_rows_with_one_prompt_are_one_draw(pairs, capsys):
    """Judged as often as they stand, but their errors are not independent."""
    rows = [{**row, "prompt": pairs[i % 3]["prompt"]} for i, row in enumerate(pairs)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_generations("ours.jsonl", lambda row: [row["chosen"]], "a" * 16)
    write_generations("theirs.jsonl", lambda row: [row["rejected"]], "b" * 16)
    argv = ["judge", "ours.jsonl", "--against", "theirs.jsonl", "--judge", "gold"]
    assert "6 comparisons of 3 prompts" in run(capsys, *argv, "--world", "reviews")


def test_lines_of_a_sheet_that_nobody_asked_for_are_said(sides, capsys):
    argv = ["judge", "ours.jsonl", "--against", "theirs.jsonl", "--judge", "human"]
    argv += ["--sheet", "sheet.jsonl"]
    run(capsys, *argv)
    lines = [json.loads(line) for line in Path("sheet.jsonl").read_text().splitlines()]
    lines = [{**line, "verdict": "1"} for line in lines]
    lines.append({**lines[0], "item": "0" * 16})
    Path("sheet.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "sheet.jsonl: 1 line belongs to other comparisons; ignored" in run(capsys, *argv)

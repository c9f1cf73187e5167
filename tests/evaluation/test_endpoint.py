"""An endpoint that fails in every way: all answers come, and none is asked for twice."""

import asyncio
import itertools
import json
import logging
import subprocess
import sys
import textwrap
import time
from email.utils import formatdate

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from evaluation.loopback import KEY, Loopback, first_times, wait_until
from tokenratio.data.chat import Conversation
from tokenratio.errors import TokenRatioError
from tokenratio.evaluation.budget import Budget, Ledger
from tokenratio.evaluation.endpoint import Endpoint, EndpointSettings, Failure
from tokenratio.evaluation.openai_api import ReplyError, Request, read_reply, retry_after
from tokenratio.masking import mask_text
from tokenratio.models.response import Response


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


def settings_for(server, **overrides):
    quick = {"concurrency": 4, "timeout": 5.0, "backoff": 0.001, "max_backoff": 0.01}
    return EndpointSettings(server.url, "tiny", **quick | overrides)


def endpoint_for(server, *, budget=None, report=None, **overrides):
    said = [] if report is None else report
    return Endpoint(settings_for(server, **overrides), budget=budget, report=said.append)


def questions(num, **overrides):
    return [Request(str(i), f"question {i}", max_tokens=10, **overrides) for i in range(num)]


def texts_of(answers):
    return {request.id: [choice.text for choice in choices] for request, choices in answers}


def expected(num):
    return {str(i): [f"answer 0 to question {i}"] for i in range(num)}


def test_the_server_speaks_the_protocol():
    """By the types of the client that OpenAI publishes."""
    server = Loopback()
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "n": 2}
    ChatCompletion.model_validate(server.completion(chat, "hello"), strict=True)
    text = {"model": "tiny", "prompt": "hello"}
    Completion.model_validate(server.completion(text, "hello"), strict=True)


def test_all_are_answered_once_and_not_too_many_at_a_time():
    with Loopback(delay=0.01) as server:
        answers = texts_of(endpoint_for(server).ask(questions(30)))
    assert answers == expected(30)
    assert set(server.asked.values()) == {1}
    assert 1 < server.most_at_once <= 4
    assert server.paths == {"/v1/chat/completions"}
    assert server.keys == {f"Bearer {KEY}"}


def test_what_is_sent():
    request = Request("a", "hi", 7, temperature=0.5, top_p=0.9, num_choices=2, seed=3)
    with Loopback() as server:
        endpoint = endpoint_for(
            server, extra_body={"top_k": 5}, max_tokens_name="max_completion_tokens"
        )
        system = Conversation([{"role": "system", "content": "hello"}])
        list(endpoint.ask([request, Request("b", system, 7)]))
    first, second = sorted(server.bodies, key=lambda body: "seed" not in body)
    assert first == {
        "messages": [{"role": "user", "content": "hi"}],
        "model": "tiny",
        "max_completion_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 2,
        "seed": 3,
        "top_k": 5,
    }
    assert second["messages"] == [{"role": "system", "content": "hello"}]
    assert not {"n", "seed", "temperature", "top_p"} & second.keys()


def test_what_a_prompt_tells_its_template_is_sent():
    """As vLLM and SGLang read it; a prompt's own arguments win over the run's."""
    turns, tools = [{"role": "user", "content": "hi"}], [{"type": "function"}]
    extra_body = {"chat_template_kwargs": {"enable_thinking": True, "depth": 2}, "top_k": 5}
    with Loopback() as server:
        endpoint = endpoint_for(server, extra_body=extra_body)
        own = Conversation(turns, tools, {"enable_thinking": False})
        list(endpoint.ask([Request("a", own, 7), Request("b", Conversation(turns), 7)]))
    first, second = sorted(server.bodies, key=lambda body: "tools" not in body)
    assert first["chat_template_kwargs"] == {"enable_thinking": False, "depth": 2}
    assert (first["tools"], first["tool_choice"], first["top_k"]) == (tools, "none", 5)
    assert second["chat_template_kwargs"] == {"enable_thinking": True, "depth": 2}
    assert "tools" not in second


def test_texts_are_gone_on_with():
    with Loopback() as server:
        endpoint = endpoint_for(server, api="completions")
        assert texts_of(endpoint.ask(questions(3))) == expected(3)
        turns = Conversation([{"role": "user", "content": "x"}])
        with pytest.raises(TokenRatioError, match=r"q is a conversation.*api=chat"):
            list(endpoint.ask([Request("q", turns, 1)]))
    assert server.paths == {"/v1/completions"}
    assert server.bodies[0].keys() == {"prompt", "model", "max_tokens"}


@pytest.mark.parametrize(
    "fault",
    [429, 500, 503, 408, "hang", "reset", "garbled", "empty", "error in 200"],
)
def test_what_passes_is_tried_again_and_nothing_else_is(fault):
    """A third of the questions fail twice."""

    def sometimes(question, times):
        return fault if int(question.split()[-1]) % 3 == 0 and times < 2 else None

    with Loopback(fault=sometimes) as server:
        endpoint = endpoint_for(server, timeout=0.3 if fault == "hang" else 5.0)
        assert texts_of(endpoint.ask(questions(9))) == expected(9)
    assert server.asked == {f"question {i}": 3 if i % 3 == 0 else 1 for i in range(9)}
    assert set(server.answered.values()) == {1}


@pytest.mark.parametrize(("retries", "said"), [(0, "tried once"), (2, "tried 3 times")])
def test_a_server_that_is_not_there_is_waited_for(retries, said):
    with Loopback() as gone:
        pass
    (answer,) = endpoint_for(gone, max_retries=retries).ask(questions(1))
    assert isinstance(answer[1], Failure)
    assert "the connection failed" in answer[1].reason
    assert answer[1].reason.endswith(said)


def test_pauses_double_and_are_shortened_at_random():
    started, times = time.monotonic(), []

    def fault(question, number):
        times.append(time.monotonic() - started)
        return 500 if number < 4 else None

    with Loopback(fault=fault) as server:
        list(endpoint_for(server, backoff=0.04, max_backoff=0.1).ask(questions(1)))
    pauses = [after - before for before, after in itertools.pairwise(times)]
    for pause, longest in zip(pauses, (0.04, 0.08, 0.1, 0.1), strict=True):
        assert longest / 2 <= pause < longest + 0.1


def test_retry_after_is_heeded():
    with Loopback(fault=first_times((429, {"Retry-After": "0.4"}, None), 1)) as server:
        started = time.monotonic()
        assert texts_of(endpoint_for(server).ask(questions(1))) == expected(1)
    assert time.monotonic() - started > 0.4


def test_retry_after_of_an_hour_is_a_no():
    with Loopback(fault=first_times((429, {"Retry-After": "3600"}, None), 1)) as server:
        ((_, answer),) = endpoint_for(server).ask(questions(1))
    assert "asks to wait for 3600 s" in answer.reason
    assert server.asked == {"question 0": 1}


def test_an_answer_without_end_is_not_kept(monkeypatch):
    monkeypatch.setattr("tokenratio.evaluation.endpoint._LONGEST_REPLY", 5000)
    with Loopback(lambda question, number: "x" * 10 ** (6 * int(question[-1:]))) as server:
        answers = dict(endpoint_for(server, max_retries=0).ask(questions(2)))
    assert [len(each.text) for each in answers[questions(2)[0]]] == [1]
    assert "the answer is longer than" in answers[questions(2)[1]].reason


def test_retry_after_in_all_its_forms():
    assert retry_after({"retry-after": "2.5"}) == 2.5
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert 55 < retry_after({"retry-after": formatdate(time.time() + 60, usegmt=True)}) <= 60
    assert retry_after({"retry-after": formatdate(time.time() - 60, usegmt=True)}) == 0
    assert retry_after({"retry-after": "soon"}) == retry_after({"retry-after": "inf"}) == 0
    late = "Thu, 99999999999999999999 Oct 2099 07:28:00 GMT"
    for odd in (late, "Fri, 31 Dec 9999 23:59:59 -2359", "", "\u00b2", "1e400", "9" * 5000, "nan"):
        assert retry_after({"retry-after": odd}) >= 0
    assert retry_after({}) == 0


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "OPENAI_API_KEY holds a key"), (403, "OPENAI_API_KEY"), (404, "model name 'tiny'")],
)
def test_a_refusal_stops_everything_and_never_shows_the_key(status, said, caplog, capfd):
    """Though the server's own message repeats it, and the client logs all it does."""
    fault = (status, {}, f"{KEY} is of no use here")
    with (
        Loopback(fault=first_times(fault, 99)) as server,
        caplog.at_level(logging.DEBUG),
        pytest.raises(TokenRatioError, match=said) as raised,
    ):
        list(endpoint_for(server).ask(questions(50)))
    assert "<key> is of no use here" in str(raised.value)
    assert sum(server.asked.values()) <= 8  # those under way at once, and then no more
    assert set(server.asked.values()) == {1}
    captured = capfd.readouterr()
    everything = [str(raised.value), repr(raised.value), caplog.text, captured.out, captured.err]
    cause = raised.value
    while (cause := cause.__cause__ or cause.__context__) is not None:
        everything.append(f"{cause} {cause!r}")
    assert not any(KEY in text for text in everything)


def test_without_a_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("OTHER_KEY", "k2")
    with Loopback() as server:
        list(endpoint_for(server).ask(questions(1)))
        list(endpoint_for(server, api_key_env="OTHER_KEY").ask(questions(1)))
    assert server.keys == {"Bearer none", "Bearer k2"}
    with (
        Loopback(fault=first_times(401, 1)) as server,
        pytest.raises(TokenRatioError, match="OPENAI_API_KEY is not set"),
    ):
        list(endpoint_for(server).ask(questions(1)))


def test_one_bad_question_does_not_stop_the_others():
    def fault(question, times):
        return (400, {}, "the prompt is too long") if question == "question 3" else None

    with Loopback(fault=fault) as server:
        answers = {r.id: a for r, a in endpoint_for(server).ask(questions(10))}
    assert answers.pop("3") == Failure("HTTP 400: the prompt is too long", is_final=True)
    assert answers.keys() == {str(i) for i in range(10)} - {"3"}
    assert not any(isinstance(answer, Failure) for answer in answers.values())
    assert set(server.asked.values()) == {1}


@pytest.mark.parametrize("before", [0, 3920, 3960])
def test_a_long_message_is_cut_between_words_and_before_it_is_masked(before, monkeypatch):
    """Else a server could stall the command, or half a secret at the cut could be shown."""
    secret = "https://me:" + "p" * 60 + "@host"
    # Masking shortens the text, so that what stands far behind is shown.
    front = f"https://a:{'q' * (before // 4 - 13)}@h " * 4 if before else ""
    message = f"{front}{secret} " + "a://b:" * 100_000
    looked_at = []

    def measured(text):
        looked_at.append(len(text))
        return mask_text(text)

    monkeypatch.setattr("tokenratio.evaluation.endpoint.mask_text", measured)
    with Loopback(fault=first_times((400, {}, message), 99)) as server:
        ((_, answer),) = endpoint_for(server).ask(questions(1))
    assert answer.reason.startswith("HTTP 400: ")
    assert answer.reason.endswith(" …")
    assert "ppp" not in answer.reason
    assert max(looked_at) <= 4000


def test_too_many_bad_questions_do():
    with Loopback(fault=first_times(400, 99)) as server:
        seen = []
        with pytest.raises(TokenRatioError, match=r"3 requests failed, the last .*injected 400"):
            seen.extend(endpoint_for(server, max_failures=3).ask(questions(50)))
    assert sum(server.asked.values()) <= 3 + 4


def test_the_estimate_comes_before_the_first_request():
    with Loopback() as server:
        said = []

        class Report(list):
            def append(self, text):
                said.append((sum(server.asked.values()), text))

        budget = Budget(price_in=2.0, price_out=10.0, max_requests=100, max_cost=1.0)
        list(endpoint_for(server, budget=budget, report=Report()).ask(questions(5)))
    # "question 0" has 10 characters, so about 3 tokens; 15 in, 50 out
    assert said[0] == (
        0,
        f"5 requests to tiny at {server.url}: about 15 tokens in, at most 50 out; at most about "
        "0.00053 (at 2 a million tokens in, 10 out), max_cost 1; max_requests 100",
    )
    # the server says: 2 words in, 5 out
    assert said[1][0] == 5
    assert "5 answers to 5 requests" in said[1][1]
    assert "10 tokens in, 25 out" in said[1][1]
    assert "about 0.00027 spent" in said[1][1]


def test_max_requests_counts_retries_and_keeps_what_came():
    with Loopback(
        fault=lambda q, times: 500 if q == "question 0" and times < 2 else None
    ) as server:
        answers = []
        budget = Budget(max_requests=10)
        with pytest.raises(TokenRatioError, match="stopped at max_requests: 10 requests"):
            answers.extend(endpoint_for(server, budget=budget).ask(questions(30)))
    assert sum(server.asked.values()) == 10
    assert len(answers) == server.answered.total() >= 8


def test_max_cost_is_never_exceeded():
    """Under way together, requests count with the most they can cost."""
    budget = Budget(max_cost=0.005, price_in=0.0, price_out=100.0)  # 10 tokens out: 0.001
    reply = " ".join(["word"] * 10)
    with Loopback(lambda question, number: reply, delay=0.01) as server:
        answers = []
        with pytest.raises(TokenRatioError, match=r"stopped before max_cost 0\.005"):
            answers.extend(endpoint_for(server, budget=budget, concurrency=20).ask(questions(30)))
    assert sum(server.asked.values()) == len(answers) == 5


def test_what_was_sent_and_lost_counts_as_spent():
    for fault, cost in (("hang", 3.0), ("reset", 3.0), ("garbled", 3.0), (500, 1.0), (429, 1.0)):
        budget = Budget(price_in=0.0, price_out=1e5)  # 10 tokens: 1
        with Loopback(lambda q, n: "w " * 10, fault=first_times(fault, 2)) as server:
            endpoint = endpoint_for(server, budget=budget, timeout=0.2)
            list(endpoint.ask(questions(1)))
        assert endpoint.ledger.cost == pytest.approx(cost), fault


def test_answers_without_usage_are_counted_roughly():
    ledger = Ledger(Budget(), count_tokens=len)
    with Loopback(lambda q, n: "12345", with_usage=False) as server:
        endpoint = Endpoint(settings_for(server), count_tokens=len, report=lambda text: None)
        list(endpoint.ask(questions(2)))
    assert (endpoint.ledger.tokens_in, endpoint.ledger.tokens_out) == (20, 10)
    messages = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": None}]
    turns = Conversation(messages)
    assert ledger.demand(turns, 7, 2).tokens_in == 3 + 2 * 4
    assert ledger.demand(turns, 7, 2).tokens_out == 14


def test_servers_that_give_one_choice_at_a_time_are_asked_again():
    with Loopback(choices=1) as server:
        answers = texts_of(endpoint_for(server).ask(questions(2, num_choices=3, seed=5)))
    assert answers["0"] == [f"answer {seed} to question 0" for seed in (5, 6, 7)]
    assert server.asked == {"question 0": 3, "question 1": 3}
    with Loopback() as server:
        assert texts_of(endpoint_for(server).ask(questions(2, num_choices=3, seed=5))) == answers
    assert server.asked == {"question 0": 1, "question 1": 1}


def test_nothing_is_sent_while_the_consumer_is_busy():
    """So a consumer that writes first loses at most what is under way."""
    with Loopback() as server:
        answers = endpoint_for(server, concurrency=3).ask(questions(20))
        next(answers)
        wait_until(lambda: server.answered.total() >= 3)
        time.sleep(0.05)
        assert server.asked.total() == 3
        answers.close()
    assert server.asked.total() == 3


ABANDONED = """
    import sys
    from tokenratio.evaluation.openai_api import Request
    from tokenratio.evaluation.endpoint import Endpoint, EndpointSettings

    endpoint = Endpoint(EndpointSettings(sys.argv[1], "tiny", concurrency=3))
    answers = endpoint.ask([Request(str(i), f"question {i}", 5) for i in range(20)])
    next(answers)
"""


@pytest.mark.slow
def test_a_process_that_abandons_its_questions_ends():
    """Closed by the garbage collector, at the very end, the loop's thread would be gone already."""
    with Loopback(delay=0.02) as server:
        code = textwrap.dedent(ABANDONED)
        command = [sys.executable, "-c", code, server.url]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert result.stderr == ""


def test_within_a_running_event_loop():
    async def notebook(server):
        return texts_of(endpoint_for(server).ask(questions(3)))

    with Loopback() as server:
        assert asyncio.run(notebook(server)) == expected(3)


def test_no_questions_say_nothing():
    said = []
    with Loopback() as server:
        assert list(endpoint_for(server, report=said).ask([])) == []
    assert said == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"base_url": "localhost:8000"}, "base_url"),
        ({"base_url": "http://me:secret@host/v1"}, "contain a user, password or query"),
        ({"base_url": "http://host/v1?key=1"}, "contain a user, password or query"),
        ({"api": "responses"}, "api"),
        ({"concurrency": 0}, "concurrency"),
        ({"timeout": 0.0}, "timeout"),
        ({"max_retries": -1}, "max_retries"),
    ],
)
def test_bad_settings_are_named(overrides, said):
    with pytest.raises(TokenRatioError, match=said) as raised:
        EndpointSettings(**{"base_url": "http://host/v1", "model": "m"} | overrides)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ({"max_cost": 1.0}, "max_cost needs price_in and price_out"),
        ({"price_in": 1.0}, "or neither"),
        ({"max_requests": -1}, "max_requests"),
        ({"price_in": float("nan"), "price_out": 1.0}, "price_in"),
    ],
)
def test_bad_budgets_are_named(budget, said):
    with pytest.raises(TokenRatioError, match=said):
        Budget(**budget)


def test_identity_has_what_answers_depend_on_and_no_more():
    one = EndpointSettings("http://host/v1", "m", concurrency=1, timeout=1.0, api_key_env="A")
    two = EndpointSettings("http://host/v1", "m")
    assert one.identity() == two.identity()
    other = EndpointSettings("http://host/v1", "m", extra_body={"top_k": 1})
    assert other.identity() != two.identity()
    json.dumps(other.identity())


@pytest.mark.parametrize("name", ["stop_token", "api_key"])
def test_identity_tells_extra_bodies_apart_and_holds_no_secret(name):
    one, two = (
        EndpointSettings("http://h/v1", "m", extra_body={name: value}).identity()
        for value in ("PLANTED-A", "PLANTED-B")
    )
    assert one != two
    assert ("PLANTED" in str(one)) == (name == "stop_token")


def reply(choice, **more):
    return json.dumps({"choices": [choice], **more})


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        (
            reply({"message": {"content": "hi"}, "finish_reason": "stop", "token_ids": [1, 2]}),
            Response("hi", "eos", (1, 2)),
        ),
        (reply({"message": {"content": None}, "finish_reason": "length"}), Response("", "length")),
        (
            reply({"message": {"content": None, "refusal": "no"}, "finish_reason": "stop"}),
            Response("no", "eos"),
        ),
        *(
            (
                reply({"message": {"content": parts}, "finish_reason": "stop"}),
                Response(said, "eos"),
            )
            for parts, said in (
                ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
                ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "b"}], "b"),
                ([{"type": "thinking", "thinking": [{"type": "text", "text": "x"}]}], ""),
            )
        ),
        (reply({"text": "on", "finish_reason": None}), Response("on", "unknown")),
        (
            reply({"text": "on", "finish_reason": "stop", "token_ids": ["x"]}, usage=[]),
            Response("on", "eos"),
        ),
    ],
)
def test_replies_are_read(text, choice):
    assert read_reply(text, 1).choices == (choice,)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "[" * 100_000, '{"choices": 3}', reply(None), reply({}), reply({"text": 3})],
)
def test_what_is_no_reply_is_said_to_be_none(text):
    with pytest.raises(ReplyError):
        read_reply(text, 1)

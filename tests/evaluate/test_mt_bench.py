"""MT-Bench end to end against a small local server that speaks the OpenAI protocol, with trouble on the way."""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from corelora.cli import main
from corelora.errors import CoreLoraError
from corelora.evaluate import mt_bench
from corelora.evaluate.judge import KEY, MODEL, URL, Endpoint, Judge, endpoint_of, read_choice, read_rating
from corelora.evaluate.mt_bench import Bench, pair_scores, rating_scores

CATEGORIES = ["writing", "math", "coding", "stem"]


class Server(ThreadingHTTPServer):
    """Rates every answer 7, or what `say` answers; its first requests fail in each way that requests fail."""

    daemon_threads = True

    def __init__(self, trouble=(), say=lambda user: "Fine. Rating: [[7]]"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.trouble, self.say = list(trouble), say
        self.asked: list[dict] = []
        self.answered: Counter = Counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append({"key": self.headers["Authorization"], "path": self.path, **body})
        trouble = self.server.trouble.pop(0) if self.server.trouble else None
        if trouble == "drop":
            self.connection.close()
            return
        if trouble in (429, 500):
            self.send_response(trouble)
            self.send_header("Retry-After", "0.01")
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")
            return
        user = body["messages"][1]["content"]
        text = "I would rather not say." if trouble == "malformed" else self.server.say(user)
        if trouble != "malformed":
            self.server.answered[(body["messages"][0]["content"], user)] += 1
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"]}
        reply["choices"] = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def files(tmp_path):
    """Eight questions, the judge's prompts and references for half of them, in FastChat's layout."""
    folder = tmp_path / "mt_bench"
    folder.mkdir()
    questions = [
        {
            "question_id": 80 + n,
            "category": CATEGORIES[n % 4],
            "turns": [f"First {n}?", f"Second {n}?"],
            "reference": None,
        }
        for n in range(8)
    ]
    single = "Q {question} A {answer}"
    multi = "Q1 {question_1} A1 {answer_1} Q2 {question_2} A2 {answer_2}"
    reference = " R {ref_answer_1}"
    pair = "Q {question} A {answer_a} B {answer_b}"
    pair_multi = "{question_1} {question_2} A {answer_a_1} {answer_a_2} B {answer_b_1} {answer_b_2}"
    templates = {
        "single-v1": single,
        "single-math-v1": single + reference,
        "single-v1-multi-turn": multi,
        "single-math-v1-multi-turn": multi + reference,
        "pair-v2": pair,
        "pair-math-v1": pair + reference,
        "pair-v2-multi-turn": pair_multi,
        "pair-math-v1-multi-turn": pair_multi + reference,
    }
    prompts = [{"name": n, "system_prompt": f"judge {n}", "prompt_template": t} for n, t in templates.items()]
    references = [
        {"question_id": q["question_id"], "choices": [{"turns": [f"ref {q['question_id']}", "ref 2"]}]}
        for q in questions
        if q["category"] in ("math", "coding")
    ]
    for name, rows in (
        ("question.jsonl", questions),
        ("judge_prompts.jsonl", prompts),
        ("reference_answer_gpt-4.jsonl", references),
    ):
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    return tmp_path


@pytest.fixture
def server(monkeypatch):
    made = Server(trouble=[429, "drop", 500, "malformed", None, "drop"])
    monkeypatch.setenv(URL, made.url)
    monkeypatch.setenv(MODEL, "judge-1")
    monkeypatch.setenv(KEY, "secret")
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    """Replies of a few tokens."""
    writing = mt_bench.Writing
    monkeypatch.setattr(mt_bench, "Writing", lambda n, stops, temperature: writing(6, stops, temperature))


def made(folder):
    return json.loads((folder / "eval" / "mt_bench-single.json").read_text())


def test_end_to_end_with_trouble(llama, files, server, tmp_path):
    """Every question is rated in both turns exactly once, whatever happens on the way; with references where due."""
    words = ["evaluate", str(llama), "--suite", "mt_bench", "--data", str(files), "--output", str(tmp_path / "out")]
    assert main(words) == 0
    result = made(tmp_path / "out")
    assert len(result["samples"]) == 8
    assert all(s["ratings"] == [7.0, 7.0] for s in result["samples"])
    assert len(server.answered) == 16
    assert set(server.answered.values()) == {1}
    assert result["scores"]["mt_bench"] == {"value": pytest.approx(0.7), "stderr": pytest.approx(0), "n": 16}
    assert {"turn 1", "turn 2", *CATEGORIES} <= set(result["scores"])
    assert {a["key"] for a in server.asked} == {"Bearer secret"}
    assert {a["path"] for a in server.asked} == {"/v1/chat/completions"}
    systems = Counter(system for system, _ in server.answered)
    assert systems == Counter(
        {
            "judge single-v1": 4,
            "judge single-math-v1": 4,
            "judge single-v1-multi-turn": 4,
            "judge single-math-v1-multi-turn": 4,
        }
    )
    assert all("R ref" in user for system, user in server.answered if "math" in system)
    asked = len(server.asked)
    assert main(words) == 0
    assert len(server.asked) == asked, "what was judged is not asked again"
    assert [s["ratings"] for s in made(tmp_path / "out")["samples"]] == [s["ratings"] for s in result["samples"]]


def test_nothing_is_sent_without_an_endpoint(llama, files, tmp_path, monkeypatch):
    for name in (URL, MODEL, KEY):
        monkeypatch.delenv(name, raising=False)
    words = ["evaluate", str(llama), "--suite", "mt_bench", "--data", str(files), "--output", str(tmp_path / "out")]
    assert main([*words, "--limit", "2"]) == 0
    result = made(tmp_path / "out")
    assert "nothing was sent" in result["notes"][0]
    assert result["scores"] == {}
    assert all(len(s["output"]) == 2 for s in result["samples"])


def test_a_judge_that_never_gives_a_verdict(tmp_path):
    server = Server(say=lambda user: "no comment")
    judge = Judge(Endpoint(server.url, "m", retries=0), tmp_path / "cache")
    assert judge.verdict("s", "u", read_rating) == (None, "no comment")
    assert len(server.asked) == 3
    rated = [{"category": "math", "ratings": [None, 5.0]}, {"category": "math", "ratings": [9.0, None]}]
    assert rating_scores(rated)["mt_bench"]["value"] == pytest.approx(0.7)


def test_pairs_are_asked_in_both_orders(files, tmp_path):
    """A judge that always likes the first answer gives ties; one that likes a text gives wins and losses."""
    row = {"question_id": 80, "category": "writing", "turns": ["one", "two"]}
    for say, expected in (
        (lambda user: "[[A]]", ["tie", "tie"]),
        (lambda user: "[[A]]" if user.index("good") < user.index("bad") else "[[B]]", ["win", "win"]),
        (lambda user: "[[B]]" if user.index("good") < user.index("bad") else "[[A]]", ["loss", "loss"]),
        (lambda user: "[[C]]", ["tie", "tie"]),
    ):
        server = Server(say=say)
        judge = Judge(Endpoint(server.url, "m"), tmp_path / f"cache{server.server_address[1]}")
        bench = Bench.beside(files / "mt_bench" / "question.jsonl", judge)
        assert bench.compare(row, ["good", "good"], ["bad", "bad"]) == expected
        assert len(server.asked) == 4


def test_two_runs_pair_by_pair(llama, files, server, tmp_path, capsys):
    """From the command: the other run's answers, both orders, win rates; what is missing is said first."""
    words = ["evaluate", str(llama), "--suite", "mt_bench", "--data", str(files), "--limit", "4"]
    pairs = [*words, "--protocol", "pairwise", "--output", str(tmp_path / "mine")]
    assert main(pairs) == 2
    assert "--against RUN" in capsys.readouterr().err
    other = str(tmp_path / "other")
    assert main([*pairs, "--against", other]) == 2
    assert "no answers are there" in capsys.readouterr().err
    assert main([*words, "--output", other]) == 0
    server.say = lambda user: "[[A]]" if len(user) % 2 else "[[B]]"
    server.answered.clear()
    assert main([*pairs, "--against", other]) == 0
    result = json.loads((tmp_path / "mine" / "eval" / "mt_bench-pairwise.json").read_text())
    assert all(len(s["choices"]) == 2 for s in result["samples"])
    assert result["scores"]["mt_bench win rate"]["n"] == 8
    parts = [result["scores"][n]["value"] for n in ("wins", "losses", "ties")]
    assert sum(parts) == pytest.approx(1)
    assert result["scores"]["mt_bench win rate"]["value"] == pytest.approx(parts[0] + parts[2] / 2)
    assert "against" in result["notes"][0]


def test_win_rates():
    """A tie counts half."""
    samples = [{"category": "math", "choices": ["win", "tie"]}, {"category": "stem", "choices": ["loss", "win"]}]
    scores = {name: score["value"] for name, score in pair_scores(samples).items()}
    assert scores["mt_bench win rate"] == pytest.approx(2.5 / 4)
    assert (scores["turn 1"], scores["turn 2"], scores["math"], scores["stem"]) == (0.5, 0.75, 0.75, 0.5)
    assert (scores["wins"], scores["losses"], scores["ties"]) == (0.5, 0.25, 0.25)


def test_a_judge_that_is_not_there(tmp_path):
    judge = Judge(Endpoint("http://127.0.0.1:9/v1", "m", retries=0), tmp_path / "cache")
    with pytest.raises(CoreLoraError, match="did not answer"):
        judge.verdict("s", "u", read_rating)


def test_endpoints():
    assert endpoint_of({}) is None
    assert endpoint_of({URL: "u", MODEL: "m"}) == Endpoint("u", "m", "none")
    with pytest.raises(CoreLoraError, match=MODEL):
        endpoint_of({URL: "u"})


@pytest.mark.parametrize(
    ("reply", "rating"),
    [("[[8]]", 8), ("Rating: [[7.5]]", 7.5), ("[3]", 3), ("[[2]] no, [[4]]", 4), ("8", None), ("[[11]]", None)],
)
def test_ratings(reply, rating):
    assert read_rating(reply) == rating


def test_choices():
    assert [read_choice(t) for t in ("[[A]]", "x [[B]].", "[[C]]", "A", "[[D]]")] == ["A", "B", "C", None, None]

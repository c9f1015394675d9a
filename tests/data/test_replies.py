"""Token ids and labels: the loss is on replies and stop tokens, borders are those of generation, cuts are counted."""

import json
from pathlib import Path

import pytest

from corelora.data import replies
from corelora.data.collate import ReplyCollator
from corelora.data.replies import begin_tokens, encode_replies, tokenizer_key
from corelora.errors import CoreLoraError
from corelora.recipe.schema import DataPart, SourcePart
from data.conftest import byte_tokenizer, llama_tokenizer, write_lines
from processes import TWO_RANKS

ROWS = [{"query": f"What is {n} + {n}?", "response": f"It is {2 * n}. é 漢"} for n in range(1, 21)]
TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2"},
]


def part(tmp_path, rows=ROWS, form="metamath", **settings):
    path = write_lines(tmp_path / "train.jsonl", rows)
    source = SourcePart(path=str(path))
    return DataPart(**{"train": source, "test": source, "form": form, "max_length": 400, "shuffle": False, **settings})


def trained_text(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def bad(data, tokenizer, which="train"):
    with pytest.raises(CoreLoraError) as raised:
        encode_replies(data, which, tokenizer)
    return str(raised.value)


@pytest.mark.parametrize("prompt", ["paper", "plain"])
def test_the_loss_is_on_the_reply_and_the_end_token(tmp_path, tokenizer, prompt):
    encoded = encode_replies(part(tmp_path, prompt=prompt), "train", tokenizer)
    assert len(encoded.dataset) == 20
    for row, source in zip(encoded.dataset, ROWS, strict=True):
        assert trained_text(tokenizer, row) == source["response"] + "<|stop|>"
        assert row["labels"][-1] == tokenizer.eos_token_id
        assert tokenizer.decode(row["input_ids"]).count(source["query"]) == 1
        n = row["labels"].count(-100)
        assert row["labels"] == [-100] * n + row["input_ids"][n:]
    assert encoded.counts["trained_tokens"] == sum(len(s["response"].encode()) + 1 for s in ROWS)
    assert encoded.counts["tokens"] == sum(len(r["input_ids"]) for r in encoded.dataset)


def test_every_reply_of_a_chat_is_trained(tmp_path, tokenizer):
    encoded = encode_replies(part(tmp_path, [{"messages": TURNS}], "chat", prompt="chat"), "train", tokenizer)
    row = encoded.dataset[0]
    assert trained_text(tokenizer, row) == "1<|end|>2<|end|>"
    text = tokenizer.decode(row["input_ids"])
    assert text + "\n" == tokenizer.apply_chat_template(TURNS, tokenize=False), "nothing is put in or left out"


def test_the_begin_token_is_there_where_the_tokenizer_puts_it(tmp_path, tokenizer):
    llama = llama_tokenizer()
    assert begin_tokens(llama) == [llama.bos_token_id]
    assert begin_tokens(tokenizer) == []
    data = part(tmp_path, [{"query": "q", "response": "r"}])
    ids = encode_replies(data, "train", llama).dataset[0]["input_ids"]
    assert ids.count(llama.bos_token_id) == 1
    assert ids[0] == llama.bos_token_id
    assert ids[-1] == llama.eos_token_id


def test_the_prompt_has_the_ids_that_generation_begins_with(tmp_path):
    """Also where a tokenizer puts a blank before each text: it comes before the prompt, not before the reply."""
    llama = llama_tokenizer()
    row = encode_replies(part(tmp_path, [{"query": "q", "response": "r"}]), "train", llama).dataset[0]
    n = row["labels"].count(-100)
    prompt = replies.PROMPTS["paper"].question([{"role": "user", "content": "q"}], llama)
    assert row["input_ids"][:n] == llama(prompt)["input_ids"]
    assert row["input_ids"][n:] == llama.convert_tokens_to_ids(["r", "</s>"])


def test_a_token_over_the_border_is_taken_apart(tmp_path):
    """ "Response:" and ")" melt into ":)", which a model that sees the prompt alone could never write."""
    tokenizer = byte_tokenizer(merges=[(":", ")"), ("x", "y")])
    assert len(tokenizer(":)xy", add_special_tokens=False)["input_ids"]) == 2
    row = encode_replies(part(tmp_path, [{"query": "q", "response": ")xy"}]), "train", tokenizer).dataset[0]
    n = row["labels"].count(-100)
    assert tokenizer.convert_ids_to_tokens(row["input_ids"][n - 1 :]) == [":", ")", "xy", "<|stop|>"]
    assert trained_text(tokenizer, row) == ")xy<|stop|>"


def test_rows_are_cut_at_the_end_and_counted(tmp_path, tokenizer):
    rows = [{"query": "q", "response": "r" * n} for n in (1, 50, 3, 51, 90)]
    encoded = encode_replies(part(tmp_path, rows, prompt="plain", max_length=53), "train", tokenizer)
    assert [len(r["input_ids"]) for r in encoded.dataset] == [4, 53, 6, 53, 53]
    assert [r["labels"][-1] == tokenizer.eos_token_id for r in encoded.dataset] == [True, True, True, False, False]
    assert encoded.counts["truncated"] == 2
    assert encoded.counts["truncated_share"] == 0.4
    assert encoded.named["truncated"] == ["train.jsonl line 4", "train.jsonl line 5"]
    assert "2 rows (40.00%) are cut at max_length: train.jsonl line 4, train.jsonl line 5" in encoded.summary()
    whole = encode_replies(part(tmp_path, rows, prompt="plain"), "train", tokenizer)
    assert whole.counts["truncated"] == 0
    assert "cut" not in whole.summary()


def test_a_prompt_that_leaves_no_room_is_an_error_or_left_out_by_name(tmp_path, tokenizer):
    rows = [{"query": "q" * n, "response": "rr"} for n in (1, 30, 9, 8)]
    data = part(tmp_path, rows, prompt="plain", max_length=10)
    message = bad(data, tokenizer)
    assert "2 of 4 rows cannot be trained. Raise data.max_length, or set data.long_prompts: leave_out." in message
    assert "train.jsonl line 2: the prompt fills max_length (10)" in message
    assert "train.jsonl line 3" in message
    encoded = encode_replies(
        part(tmp_path, rows, prompt="plain", max_length=10, long_prompts="leave_out"), "train", tokenizer
    )
    assert [len(r["input_ids"]) for r in encoded.dataset] == [5, 10]
    assert encoded.named["left_out"] == ["train.jsonl line 2", "train.jsonl line 3"]
    assert (encoded.counts["rows"], encoded.counts["left_out"], encoded.counts["truncated"]) == (2, 2, 1)
    assert "2 rows are left out, their prompts alone fill max_length: train.jsonl line 2" in encoded.summary()
    assert "4 of 4 rows" in bad(part(tmp_path, rows, max_length=10, long_prompts="leave_out"), tokenizer)


def test_rows_that_a_prompt_cannot_hold_are_named(tmp_path, tokenizer):
    rows = [{"messages": TURNS[:2]}, {"messages": TURNS}]
    message = bad(part(tmp_path, rows, "chat", prompt="paper"), tokenizer)
    assert "1 of 2 rows cannot be trained" in message
    assert "train.jsonl line 2: prompt 'paper' holds one question and one reply, this row has 4 turns" in message


def test_prompts_that_do_not_fit_the_tokenizer(tmp_path):
    tokenizer = byte_tokenizer(eos_token=None)
    assert "no end token" in bad(part(tmp_path), tokenizer)
    tokenizer.chat_template = None
    assert "no chat template; use prompt 'paper'" in bad(part(tmp_path, prompt="chat"), tokenizer)


def test_no_test_rows(tmp_path, tokenizer):
    assert "has no data.test" in bad(part(tmp_path, test=None), tokenizer, "test")


def test_the_order_comes_from_the_seed_for_training_rows_only(tmp_path, tokenizer):
    data = part(tmp_path, shuffle=True)
    plain = encode_replies(part(tmp_path), "train", tokenizer).dataset["input_ids"][:]
    orders = [encode_replies(data, "train", tokenizer, seed) for seed in (1, 1, 2)]
    ids = [e.dataset["input_ids"][:] for e in orders]
    assert ids[0] == ids[1] != ids[2]
    assert ids[0] != plain
    assert sorted(ids[0]) == sorted(ids[2]) == sorted(plain)
    assert len({e.fingerprint for e in orders}) == 2
    assert encode_replies(data, "test", tokenizer, 1).dataset["input_ids"][:] == plain


def test_several_processes_make_the_same_rows(tmp_path, tokenizer, monkeypatch):
    one = encode_replies(part(tmp_path), "train", tokenizer)
    monkeypatch.setenv("CORELORA_CACHE", str(tmp_path / "other"))
    two = encode_replies(part(tmp_path, workers=2), "train", tokenizer)
    assert one.dataset[:] == two.dataset[:]
    assert one.counts == two.counts


def test_tokenised_once_until_something_changes(tmp_path, tokenizer, monkeypatch):
    first = encode_replies(part(tmp_path), "train", tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(replies, "_encode", lambda *_: pytest.fail("made again"))
        again = encode_replies(part(tmp_path), "train", byte_tokenizer())
        assert again.dataset[:] == first.dataset[:]
        assert again.fingerprint == first.fingerprint
        assert again.counts == first.counts
    changes = [{"prompt": "plain"}, {"max_length": 399}, {"rows": ROWS[1:]}, {"columns": {"query": "response"}}]
    prints = {encode_replies(part(tmp_path, **change), "train", tokenizer).fingerprint for change in changes}
    assert len(prints | {first.fingerprint}) == 5


def test_a_tokenizers_key_is_its_rules_not_its_last_call():
    first = tokenizer_key(byte_tokenizer())
    used = byte_tokenizer()
    used(["a", "bb"], padding=True, truncation=True, max_length=2)
    assert tokenizer_key(used) == first
    other = byte_tokenizer()
    other.chat_template += " "
    merged = byte_tokenizer(merges=[("a", "b")])
    assert len({first, tokenizer_key(other), tokenizer_key(merged), tokenizer_key(llama_tokenizer())}) == 4


RANK = """
import json, sys
from pathlib import Path
from accelerate import PartialState
from corelora.data import replies
from corelora.recipe.schema import DataPart, SourcePart
from data.conftest import byte_tokenizer

state, made = PartialState(cpu=True), []
encode = replies._encode
replies._encode = lambda *given: (made.append(1), encode(*given))
data = DataPart(train=SourcePart(path=sys.argv[1]), form="metamath", packing=True)
encoded = replies.encode_replies(data, "train", byte_tokenizer())
out = {"made": len(made), "ids": encoded.dataset["input_ids"][:], "fingerprint": encoded.fingerprint}
Path(sys.argv[2], f"{state.process_index}.json").write_text(json.dumps(out))
"""


@pytest.mark.slow
def test_two_processes_tokenise_once(tmp_path, cache, driver):
    """The second one waits, and reads what the first made."""
    path = write_lines(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "rank.py").write_text(RANK)
    environment = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = driver.call(*TWO_RANKS, tmp_path / "rank.py", path, tmp_path, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(2)]
    assert [r["made"] for r in ranks] == [1, 0]
    assert ranks[0]["ids"] == ranks[1]["ids"]
    assert ranks[0]["fingerprint"] == ranks[1]["fingerprint"]
    assert not list(cache.rglob(".making-*"))


# -- batches ---------------------------------------------------------------------------------------------------------


def test_padding_has_no_label_and_no_attention():
    batch = ReplyCollator(9)([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }


def test_packed_rows_have_positions_and_no_mask():
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, 4], "position_ids": [0, 1, 0, 1]},
        {"input_ids": [5], "labels": [-100], "position_ids": [0]},
    ]
    batch = ReplyCollator(9)(rows)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[1, 2, 3, 4], [5, 9, 9, 9]],
        "labels": [[-100, 2, -100, 4], [-100] * 4],
        "position_ids": [[0, 1, 0, 1], [0, 0, 1, 2]],
    }
    batch = ReplyCollator(9, flatten=True)(rows)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5]],
        "labels": [[-100, 2, -100, 4, -100]],
        "position_ids": [[0, 1, 0, 1, 0]],
    }

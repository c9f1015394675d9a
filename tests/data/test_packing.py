"""Packed rows: as few sequences as fit, each token as if its row were alone, and a check that notices when not."""

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from corelora.data.collate import ReplyCollator
from corelora.data.packing import border_problem
from corelora.data.replies import encode_replies
from corelora.recipe.schema import DataPart, SourcePart
from data.conftest import byte_tokenizer, write_lines

ROWS = [{"query": "q" * (n % 7 + 1), "response": "r" * (5 * n % 37 + 1)} for n in range(40)]
LENGTH = 64


def tiny(attention, **settings):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=300, num_hidden_layers=2, max_position_embeddings=LENGTH, **{"use_cache": False, **sizes, **settings}
    )
    return LlamaForCausalLM._from_config(config, attn_implementation=attention).eval()


@pytest.fixture
def both(tmp_path):
    """The same rows packed and not."""
    source = SourcePart(path=str(write_lines(tmp_path / "train.jsonl", ROWS)))
    made = []
    for packing in (True, False):
        data = DataPart(
            train=source,
            test=source,
            form="metamath",
            prompt="plain",
            max_length=LENGTH,
            packing=packing,
            shuffle=False,
        )
        made.append(encode_replies(data, "train", byte_tokenizer()))
    test = encode_replies(data, "test", byte_tokenizer())
    return (*made, test)


def rows_of(sequence):
    """The rows in a packed sequence: (ids, labels, where it begins)."""
    starts = [n for n, p in enumerate(sequence["position_ids"]) if p == 0]
    ends = [*starts[1:], len(sequence["input_ids"])]
    return [(sequence["input_ids"][a:b], sequence["labels"][a:b], a) for a, b in zip(starts, ends, strict=True)]


def test_packing_loses_no_row_and_little_room(both):
    packed, plain, test = both
    found = sorted((ids, labels) for sequence in packed.dataset for ids, labels, _ in rows_of(sequence))
    assert found == sorted((r["input_ids"], r["labels"]) for r in plain.dataset)
    tokens = sum(len(r["input_ids"]) for r in plain.dataset)
    assert max(len(s["input_ids"]) for s in packed.dataset) <= LENGTH
    assert len(packed.dataset) <= -(-tokens // LENGTH) + 1, "best fit"
    assert packed.counts["sequences"] == len(packed.dataset) < packed.counts["rows"] == 40
    assert f"packed into {len(packed.dataset)} sequences" in packed.summary()
    assert packed.fingerprint != plain.fingerprint
    assert "position_ids" not in test.dataset.column_names, "test rows stay as they are"


def test_each_row_begins_with_a_token_that_is_not_trained(both):
    """Else the last token of the row before would learn to foretell it."""
    for sequence in both[0].dataset:
        assert all(labels[0] == -100 for _, labels, _ in rows_of(sequence))


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_rows_alone(both, attention, flatten):
    model, sequences = tiny(attention), [both[0].dataset[n] for n in (0, len(both[0].dataset) - 1, 1)]
    batch = ReplyCollator(0, flatten=flatten)(sequences)
    with torch.no_grad():
        logits = model(**batch).logits
        begin = 0
        for n, sequence in enumerate(sequences):
            for ids, _, a in rows_of(sequence):
                alone = model(input_ids=torch.tensor([ids])).logits[0]
                here = logits[0, begin + a :] if flatten else logits[n, a:]
                torch.testing.assert_close(here[: len(ids)], alone, atol=1e-5, rtol=1e-5)
            begin += len(sequence["input_ids"])
    assert sum(len(rows_of(s)) for s in sequences) > len(sequences)


def test_the_loss_is_that_of_rows_alone(both):
    """Mean over trained tokens, in a batch of several packed sequences."""
    model, packed, plain, _ = tiny("sdpa"), *both
    with torch.no_grad():
        one = model(**ReplyCollator(0)([packed.dataset[n] for n in range(len(packed.dataset))])).loss
        other = model(**ReplyCollator(0)([plain.dataset[n] for n in range(len(plain.dataset))])).loss
    assert one.item() == pytest.approx(other.item(), abs=1e-5)


def test_flash_attention_gets_a_border_for_each_row(both):
    """In a flattened batch, as transformers reads borders for it."""
    sequences = [both[0].dataset[n] for n in range(3)]
    batch = ReplyCollator(0, flatten=True)(sequences)
    (borders, _), _ = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    lengths = [len(ids) for s in sequences for ids, _, _ in rows_of(s)]
    assert borders.tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]


@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_border_check_passes_what_holds(attention, flatten):
    model = tiny(attention).train()
    assert border_problem(model, ReplyCollator(0, flatten=flatten)) is None
    assert model.training, "the model is left as it was"


class Masked(ReplyCollator):
    """Batches with an attention mask, which makes transformers blind to borders."""

    def __call__(self, rows):
        """With a mask of ones."""
        batch = super().__call__(rows)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


def test_the_border_check_notices_every_way_to_see_the_row_before():
    words = "rows packed into one sequence see each other"
    assert words in border_problem(tiny("sdpa", use_cache=True), ReplyCollator(0))
    assert words in border_problem(tiny("sdpa"), Masked(0))
    bloom = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2, use_cache=False))
    assert words in border_problem(bloom, ReplyCollator(0)), "it knows no positions"


def test_the_border_check_names_a_model_without_positions():
    class Other(torch.nn.Linear):
        def forward(self, input_ids, labels):
            raise AssertionError("not reached")

    assert "does not take position_ids" in border_problem(Other(1, 1), ReplyCollator(0))

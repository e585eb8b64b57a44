"""Texts of questions as token ids, kept without padding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer
from support import training_models
from support.small_records import VOCABULARY, records_in

from clipmapper.data.records import Record, RecordData
from clipmapper.data.tables.builder import as_table
from clipmapper.data.token_cache import TokenStore
from clipmapper.models import encoder as encoder_identity
from clipmapper.models.encoder import weights_digest
from clipmapper.models.tokens import tokenize
from clipmapper.tasks.vqa.batches import QuestionBatches
from clipmapper.training import encoder_tokens as module
from clipmapper.training.encoder_tokens import asked_texts
from clipmapper.training.record_tokens import check_room

BPE = SimpleTokenizer(context_length=16)
TEXTS = st.lists(st.text("ab 07.é?\U0001f600", min_size=1, max_size=20), min_size=1, max_size=12)


@settings(max_examples=60)
@given(texts=TEXTS, together=st.integers(1, 5))
@pytest.mark.filterwarnings("ignore:text of")
def test_they_are_those_of_all_texts_at_once(texts, together):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TOGETHER", together)
        table = as_table([Record(n, b"", "0", text, ("a",)) for n, text in enumerate(texts)])
        asked = asked_texts(BPE, table, "train")
        different = sorted(set(texts))
        whole = tokenize(BPE, different)
        # The key of files that older versions have written.
        assert asked.digest() == weights_digest({"ids": whole.ids, "valid": whole.valid})
    assert len(asked) == len(different) and asked.longest == whole.ids.shape[1]
    for rows in (range(len(asked)), [len(asked) - 1, 0]):
        some = tokenize(BPE, [different[row] for row in rows])
        ids, valid = asked.padded(rows)
        assert ids.equal(some.ids) and valid.equal(some.valid)
    assert [different[number] for number in asked.text_of] == texts


def test_questions_of_some_records_alone():
    records = [Record(n, b"", "0", text, ("a",)) for n, text in enumerate("dbcab")]
    different, number_of = as_table(records).take(torch.tensor([4, 0, 1]).numpy()).different_questions()
    assert different.to_pylist() == [b"b", b"d"] and number_of.tolist() == [0, 1, 0]


def test_nothing_is_looked_at_twice(tmp_path, monkeypatch):
    """Neither texts nor weights: not by the check of room and then again for the tokens."""
    model = training_models.tiny_model(training_models.tiny_clip(tmp_path)).eval()
    records, tokenized, weighed = records_in(tmp_path / "images"), [], []
    data = RecordData({"train": records, "validation": records}, VOCABULARY)

    def counting(tokenizer, texts):
        tokenized.extend(texts)
        return tokenize(tokenizer, texts)

    def weighing(state):
        weighed.append(len(state))
        return weights_digest(state)

    monkeypatch.setattr(module, "tokenize", counting)
    monkeypatch.setattr(encoder_identity, "weights_digest", weighing)
    store = TokenStore(tmp_path / "cache")
    check_room(model.encoder, store, data.splits, data.reader(model.encoder), texts=True)
    for name, some in data.splits.items():
        QuestionBatches(model, data, name, some, store)
    assert sorted(tokenized) == sorted(2 * ["what colour is the thing on the left?", "what is it?"])
    assert len(weighed) == 2  # of images, and of texts

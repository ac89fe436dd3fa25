"""Training dual encoders and their teachers with Trainer, on a task of words that a small model learns at once."""

import copy
import json
import math
import random

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertTokenizer, TrainingArguments

import hf_attn
from hf_attn import DualEncoderConfig, DualEncoderModel
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.recipes.dual_encoder import (
    CrossEncoderTrainer,
    DualEncoderCollator,
    DualEncoderTrainer,
    PairCollator,
    encode,
    hard_negatives,
    ranking_metrics,
    retrieve,
    teacher_scores,
)
from tests.helpers import BERT, agree, normal

WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return BertTokenizer(str(path))


def examples(count=48, documents=4, seed=0, scores=False):
    """A document is relevant that repeats the query's first word."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        query = draw.sample(WORDS, 2)
        others = [w for w in WORDS if w not in query]
        size = draw.randint(2, documents)
        texts = [" ".join(draw.sample(others, 3)) for _ in range(size)]
        place = draw.randrange(size)
        texts[place] = f"{query[0]} {texts[place]}"
        labels = [int(i == place) for i in range(size)]
        row = {"query": " ".join(query), "documents": texts, "labels": labels}
        if scores:
            row["teacher_scores"] = [5.0 * label - 0.1 * i for i, label in enumerate(labels)]
        rows.append(row)
    return rows


def student(**fields):
    config = hf_attn.AttnBertConfig(**BERT, attn_implementation="softmax")
    values = {"pooling": "mean", "distill_loss": "onehot", **fields}
    return DualEncoderModel(DualEncoderConfig(query_encoder=config, **values))


def teacher_of(**fields):
    return AutoModelForSequenceClassification.from_config(BertConfig(**BERT, num_labels=1, **fields))


def arguments(folder, **changes):
    given = {"output_dir": str(folder), "max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 5e-3,
             "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "logging_steps": 10}  # fmt: skip
    return TrainingArguments(**{**given, **changes})


def trainer(tokenizer, folder, model=None, data=None, **changes):
    options = {k: changes.pop(k) for k in ("teacher", "data_collator", "compute_metrics") if k in changes}
    options.setdefault("data_collator", DualEncoderCollator(tokenizer))
    return DualEncoderTrainer(
        model if model is not None else student(),
        args=arguments(folder, **changes),
        train_dataset=examples(scores=True) if data is None else data,
        eval_dataset=examples(24, seed=1),
        **options,
    )


def test_a_batch_holds_every_document_and_marks_missing_ones(tokenizer):
    rows = examples(5, seed=3, scores=True)
    batch = DualEncoderCollator(tokenizer)(rows)
    counts = [len(row["documents"]) for row in rows]
    assert len(set(counts)) > 1 and batch["doc_mask"].sum(1).tolist() == counts
    assert batch["doc_input_ids"].shape[:2] == batch["labels"].shape == batch["teacher_scores"].shape
    for i, row in enumerate(rows):
        for j, text in enumerate(row["documents"]):
            ids = batch["doc_input_ids"][i, j][batch["doc_attention_mask"][i, j].bool()]
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert batch["labels"][i].tolist() == row["labels"] + [-100] * (batch["labels"].shape[1] - counts[i])
        torch.testing.assert_close(batch["teacher_scores"][i, : counts[i]], torch.tensor(row["teacher_scores"]))


def test_pairs_of_a_teacher_are_the_listed_ones_or_all(tokenizer):
    rows = examples(3, seed=3)
    listed, every = PairCollator(tokenizer)(rows), PairCollator(tokenizer, every_pair=True)(rows)
    count = listed["labels"].shape[1]
    assert len(listed["input_ids"]) == 3 * count and len(every["input_ids"]) == 3 * 3 * count
    for query in range(3):
        first = every["input_ids"][3 * count * query + count * query]
        assert (
            tokenizer.decode(first, skip_special_tokens=True) == f"{rows[query]['query']} {rows[query]['documents'][0]}"
        )


def test_training_by_labels_ranks_held_out_queries(tokenizer, tmp_path):
    run = trainer(tokenizer, tmp_path, data=examples(96))
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_mrr@10"] > 0.9 > before["eval_mrr@10"]
    assert after["eval_loss"] < before["eval_loss"] and after["eval_ndcg@10"] > before["eval_ndcg@10"]


@pytest.mark.parametrize("loss", ["m3se", "margin_mse", "mse", "softmax_ce"])
def test_training_by_stored_scores(loss, tokenizer, tmp_path):
    run = trainer(tokenizer, tmp_path, student(distill_loss=loss), examples(96, scores=True), max_grad_norm=1.0)
    before = run.evaluate()["eval_mrr@10"]
    run.train()
    assert run.evaluate()["eval_mrr@10"] > max(0.8, before)


def test_a_cross_encoder_is_trained_and_teaches(tokenizer, tmp_path):
    torch.manual_seed(1)
    teacher = teacher_of()
    train = CrossEncoderTrainer(
        teacher, args=arguments(tmp_path, max_steps=20), data_collator=PairCollator(tokenizer),
        train_dataset=examples(96), eval_dataset=examples(24, seed=1),
    )  # fmt: skip
    first = train.evaluate()["eval_loss"]
    train.train()
    assert train.evaluate()["eval_loss"] < first
    weights = copy.deepcopy(teacher.state_dict())
    collator = DualEncoderCollator(tokenizer, teacher=PairCollator(tokenizer))
    run = trainer(
        tokenizer, tmp_path, student(distill_loss="m3se"), teacher=teacher, data_collator=collator, max_steps=5
    )
    run.train()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in teacher.state_dict().items())
    assert "teacher" not in " ".join(run.model.state_dict()), "it is not saved with the student"


@pytest.mark.parametrize("loss", ["m3se", "mse"])
def test_scores_on_line_are_the_stored_ones(loss, tokenizer, tmp_path):
    """The teacher scores in evaluation mode, so both ways train the same model, step by step."""
    torch.manual_seed(1)
    teacher = teacher_of()
    rows = examples(32)
    stored = teacher_scores(teacher.train(), tokenizer, rows, batch_size=5)
    assert teacher.training and [len(s) for s in stored] == [len(row["documents"]) for row in rows]
    ways = {}
    for way in ("stored", "on line"):
        torch.manual_seed(0)
        model = student(distill_loss=loss)
        data = [{**row, "teacher_scores": s} for row, s in zip(rows, stored)] if way == "stored" else rows
        options = {} if way == "stored" else {"teacher": teacher, "data_collator": DualEncoderCollator(tokenizer, teacher=PairCollator(tokenizer))}  # fmt: skip
        trainer(tokenizer, tmp_path, model, data, max_steps=3, **options).train()
        ways[way] = model.state_dict()
    for name, tensor in ways["stored"].items():
        torch.testing.assert_close(ways["on line"][name], tensor, rtol=1e-4, atol=1e-5)


def test_a_teacher_may_score_every_pair_of_a_batch(tokenizer, tmp_path):
    collator = DualEncoderCollator(tokenizer, teacher=PairCollator(tokenizer, every_pair=True))
    model = student(distill_loss="softmax_ce", in_batch_negatives=True)
    run = trainer(tokenizer, tmp_path, model, teacher=teacher_of(), data_collator=collator, max_steps=2)
    run.train()
    assert all(math.isfinite(entry["loss"]) for entry in run.state.log_history if "loss" in entry)


def test_a_run_resumes_where_it_stopped(tokenizer, tmp_path):
    def run(**changes):
        torch.manual_seed(0)
        return trainer(tokenizer, tmp_path, max_steps=6, save_strategy="steps", save_steps=3, seed=3, **changes)

    straight = run()
    straight.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, tensor in straight.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)


def test_metrics_leave_missing_documents_out():
    class Prediction:
        predictions = (normal(3, 4).numpy(), "embeddings")
        label_ids = torch.tensor([[0, 1, -100, -100], [1, 0, 0, -100], [0, 0, 0, 1]]).numpy()

    scores = torch.from_numpy(Prediction.predictions[0])
    alone = [
        type("P", (), {"predictions": s[None, :n], "label_ids": torch.from_numpy(y)[None, :n]})
        for s, y, n in zip(scores, Prediction.label_ids, (2, 3, 4))
    ]
    for name, value in ranking_metrics(Prediction).items():
        assert value == pytest.approx(sum(ranking_metrics(one)[name] for one in alone) / 3)


def test_embeddings_come_in_the_order_of_the_texts(tokenizer):
    model = student(embedding_dim=6)
    texts = [" ".join(WORDS[: 1 + 7 * i % 11]) for i in range(9)]
    model.train()
    together = encode(model, tokenizer, texts, "document", batch_size=4)
    assert model.training and together.shape == (9, 6)
    for text, row in zip(texts, together):
        torch.testing.assert_close(encode(model, tokenizer, [text], "document")[0], row, rtol=1e-4, atol=1e-5)


def test_hard_negatives_are_the_nearest_that_are_not_positive():
    queries, documents, positives = normal(6, 4), normal(20, 4, seed=1), [[i, 19 - i] for i in range(6)]
    found = hard_negatives(queries, documents, positives, 3, skip=1)
    for query, own, row in zip(queries, positives, found):
        order = [i for i in (documents @ query).argsort(descending=True).tolist() if i not in own]
        assert row == order[1:4]
    assert [len(row) for row in hard_negatives(queries, documents[:3], [[0]] * 6, 5)] == [2] * 6


def test_retrieval_among_all_documents(tokenizer):
    model, rows = student().eval(), examples(8)
    documents = [text for row in rows for text in row["documents"]]
    found = retrieve(model, tokenizer, documents[:5], documents, [[i] for i in range(5)], ks=(1, 3))
    assert found.keys() == {"mrr@10", "recall@1", "recall@3"}
    scores = encode(model, tokenizer, documents[:5], "query") @ encode(model, tokenizer, documents, "document").T
    ranks = [1 + int((row > row[i]).sum()) for i, row in enumerate(scores)]
    agree(torch.tensor(found["recall@3"]), torch.tensor(sum(r <= 3 for r in ranks) / 5), 1e-6)


@pytest.mark.parametrize("case", ["collator", "model", "teacher", "classes", "pairs", "count", "scores", "cross"])
def test_refusals(case, tokenizer, tmp_path):
    given = {"model": student(), "args": arguments(tmp_path), "data_collator": DualEncoderCollator(tokenizer)}
    paired = DualEncoderCollator(tokenizer, teacher=PairCollator(tokenizer))
    rows = examples(2, scores=True)
    calls = {
        "collator": lambda: DualEncoderTrainer(**{**given, "data_collator": None}),
        "model": lambda: DualEncoderTrainer(**{**given, "model": teacher_of()}),
        "teacher": lambda: DualEncoderTrainer(**given, teacher=teacher_of()),
        "classes": lambda: DualEncoderTrainer(
            **{**given, "data_collator": paired},
            teacher=AutoModelForSequenceClassification.from_config(BertConfig(**BERT, num_labels=2)),
        ),
        "pairs": lambda: DualEncoderTrainer(
            **{**given, "data_collator": DualEncoderCollator(tokenizer, teacher=PairCollator(tokenizer, every_pair=True))},
            teacher=teacher_of(),
        ),
        "count": lambda: given["data_collator"]([{**rows[0], "labels": [1]}, rows[1]]),
        "scores": lambda: given["data_collator"]([rows[0], {k: v for k, v in rows[1].items() if k != "teacher_scores"}]),
        "cross": lambda: CrossEncoderTrainer(
            AutoModelForSequenceClassification.from_config(BertConfig(**BERT, num_labels=2)), data_collator=PairCollator(tokenizer)
        ),
    }  # fmt: skip
    messages = {
        "collator": "data_collator is missing", "model": "DualEncoderModel", "teacher": "belong together",
        "classes": "num_labels=2", "pairs": "in_batch_negatives", "count": "a label for each", "scores": "all, or none",
        "cross": "num_labels=2",
    }  # fmt: skip
    with pytest.raises((InvalidInput, InvalidOption, Unsupported), match=messages[case]):
        calls[case]()


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize(
    "fields", [{}, {"embedding_dim": 6, "projection_bias": True}, {"embedding_dim": 5, "normalize": True}], ids=str
)
def test_sentence_transformers_gives_the_same_embeddings(pooling, fields, tokenizer, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from hf_attn.recipes.dual_encoder_export import save_sentence_transformer

    model = student(pooling=pooling, **fields).eval()
    save_sentence_transformer(model, tokenizer, tmp_path / "out")
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    texts = [" ".join(WORDS[: 1 + i]) for i in (3, 0, 7)]
    found = loaded.encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(found, encode(model, tokenizer, texts, "query"), rtol=1e-4, atol=1e-5)
    agree(loaded.similarity(found, found), found @ found.T, 1e-5)
    with pytest.raises(InvalidInput, match="empty folder"):
        save_sentence_transformer(model, tokenizer, tmp_path / "out")


def test_two_towers_are_two_folders_for_sentence_transformers(tokenizer, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from hf_attn.recipes.dual_encoder_export import save_sentence_transformer

    config = DualEncoderConfig(query_encoder=BertConfig(**BERT), document_encoder=BertConfig(**BERT), embedding_dim=6)
    model = DualEncoderModel(config).eval()
    with pytest.raises(InvalidOption, match="side"):
        save_sentence_transformer(model, tokenizer, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    for side in ("query", "document"):
        save_sentence_transformer(model, tokenizer, tmp_path / side, side=side)
        loaded = sentence_transformers.SentenceTransformer(str(tmp_path / side), device="cpu")
        found = loaded.encode(WORDS[:4], convert_to_tensor=True)
        torch.testing.assert_close(found, encode(model, tokenizer, WORDS[:4], side), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "query" / "modules.json").read_text())[2]["type"].endswith("Dense")


def test_sentence_transformers_trains_with_the_losses(tokenizer, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from hf_attn.models.dual_encoder_losses import LOSSES
    from hf_attn.recipes.dual_encoder_export import SentenceDistillationLoss, save_sentence_transformer

    model = student().eval()
    save_sentence_transformer(model, tokenizer, tmp_path / "out")
    loaded = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu").eval()
    rows = [["w1 w2", "w1 w5", "w7", "w8 w9"], ["w3", "w3 w4", "w2", "w6 w7 w8"]]
    columns = [dict(tokenizer([row[i] for row in rows], padding=True, return_tensors="pt")) for i in range(4)]
    scores, labels = 3 * torch.randn(2, 3), torch.tensor([[1, 0, 0]] * 2)
    query, *documents = (encode(model, tokenizer, [row[i] for row in rows], "query") for i in range(4))
    own = 2 * (query[:, None] * torch.stack(documents, 1)).sum(-1)
    for name, function in LOSSES.items():
        found = SentenceDistillationLoss(loaded, name, score_scale=2.0)(columns, scores)
        torch.testing.assert_close(found, function(own, scores, labels), rtol=1e-4, atol=1e-5)
    found.backward()
    assert any(p.grad is not None and p.grad.any() for p in loaded.parameters())
    with pytest.raises(InvalidInput, match="each document"):
        SentenceDistillationLoss(loaded)(columns, scores[:, :2])
    with pytest.raises(InvalidOption, match="distill_loss"):
        SentenceDistillationLoss(loaded, "rankdistil")

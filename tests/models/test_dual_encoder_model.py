"""Dual encoders: any backbone, pooling, padding, in-batch negatives, saving and loading, the Auto classes, refusals."""

import itertools
import math

import pytest
import torch
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, DistilBertConfig, GPT2Config, T5Config, ViTConfig

import hf_attn
from hf_attn import DualEncoderConfig, DualEncoderModel
from hf_attn.errors import InvalidInput, InvalidOption, Unsupported
from hf_attn.models.dual_encoder import in_batch, pool
from hf_attn.models.dual_encoder_losses import LOSSES, m3se_loss, onehot_loss
from tests.helpers import BERT, GPT2, agree, normal

GAU = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "query_key_dim": 16, "max_position_embeddings": 64}
BACKBONES = {
    "bert": lambda: BertConfig(**BERT),
    "distilbert": lambda: DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64),
    "softmax": lambda: hf_attn.AttnBertConfig(**BERT, attn_implementation="softmax"),
    "rfa": lambda: hf_attn.AttnBertConfig(**BERT, attn_implementation="rfa"),
    "lara": lambda: hf_attn.AttnBertConfig(**BERT, attn_implementation={"default": "softmax", "1": "lara"}),
    "gau": lambda: hf_attn.GauConfig(**GAU),
}
backbones = pytest.mark.parametrize("backbone", BACKBONES)


def model_of(backbone="softmax", document=None, **fields):
    encoders = {"query_encoder": BACKBONES[backbone]()}
    if document is not None:
        encoders["document_encoder"] = BACKBONES[document]()
    return DualEncoderModel(DualEncoderConfig(**encoders, **{"pooling": "mean", **fields})).eval()


def batch_of(queries=3, documents=4):
    """Queries of up to 6 tokens, up to 4 documents each of up to 9 tokens."""
    generator = torch.Generator().manual_seed(1)
    batch = {
        "query_input_ids": torch.randint(1, 99, (queries, 6), generator=generator),
        "query_attention_mask": torch.ones(queries, 6, dtype=torch.long),
        "doc_input_ids": torch.randint(1, 99, (queries, documents, 9), generator=generator),
        "doc_attention_mask": torch.ones(queries, documents, 9, dtype=torch.long),
        "doc_mask": torch.ones(queries, documents, dtype=torch.bool),
        "labels": torch.zeros(queries, documents, dtype=torch.long),
        "teacher_scores": 3 * torch.randn(queries, documents, generator=generator),
    }
    batch["query_attention_mask"][1, 4:] = 0
    batch["doc_attention_mask"][0, 1, 5:] = 0
    batch["doc_mask"][2, 3] = False
    batch["labels"][:, 0] = 1
    batch["labels"][2, 3] = -100
    return batch


def scores_of(model, batch):
    with torch.no_grad():
        return model(**{n: t for n, t in batch.items() if n not in ("labels", "teacher_scores")}).scores


@backbones
@pytest.mark.parametrize("document", [None, "bert"])
def test_every_backbone_trains_and_scores_are_dot_products(backbone, document):
    model, batch = model_of(backbone, document, embedding_dim=5, score_scale=2.0).train(), batch_of()
    output = model(**batch)
    output.loss.backward()
    for name in ("query_projection", "query_encoder"):
        gradients = [p.grad for p in getattr(model, name).parameters() if p.grad is not None]
        assert gradients and any(g.any() for g in gradients) and all(torch.isfinite(g).all() for g in gradients)
    expected = 2 * torch.einsum("bd,bnd->bn", output.query_embeds, output.doc_embeds)
    torch.testing.assert_close(output.scores[:2], expected[:2])
    assert output.scores[2, 3] == -math.inf and torch.isfinite(output.scores[2, :3]).all()


@backbones
@pytest.mark.parametrize("document", [None, "rfa"])
def test_saving_and_loading(backbone, document, tmp_path):
    model, batch = model_of(backbone, document, embedding_dim=7, learn_score_scale=True, score_scale=3.0), batch_of()
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is DualEncoderModel and type(again.query_encoder) is type(model.query_encoder)
    assert again.config.query_encoder.to_dict().get("attention") == model.config.query_encoder.to_dict().get(
        "attention"
    )
    assert (again.document_encoder is None) == (document is None)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert torch.equal(scores_of(again, batch), scores_of(model, batch))
    assert torch.equal(scores_of(DualEncoderModel.from_pretrained(tmp_path).eval(), batch), scores_of(model, batch))


def test_loaded_encoders_are_kept_and_the_choice_of_attention_is_stored(tmp_path):
    encoder = hf_attn.convert(BertModel(BertConfig(**BERT)), {"default": "softmax", "0": "rfa"}).eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    model = DualEncoderModel.from_encoders(encoder, pooling="mean", learn_score_scale=True, score_scale=5.0)
    assert model.query_encoder is encoder and model.config.shared_encoder
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    assert model.score_scale.item() == pytest.approx(5.0)
    hf_attn.convert(model.query_encoder, {"default": "softmax", "1": "rfa"})
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.query_encoder.attention == model.query_encoder.config.attention
    assert config.query_encoder.attention["1"]["name"] == "rfa" and "0" not in config.query_encoder.attention
    loaded = DualEncoderModel.from_pretrained(tmp_path).eval()
    assert torch.equal(scores_of(loaded, batch_of()), scores_of(model.eval(), batch_of()))


def test_the_same_encoder_twice_is_one():
    encoder = BertModel(BertConfig(**BERT))
    model = DualEncoderModel.from_encoders(encoder, encoder)
    assert model.document_encoder is None and model.config.shared_encoder
    other = DualEncoderModel.from_encoders(encoder, BertModel(BertConfig(**BERT)))
    assert not other.config.shared_encoder and other.document_encoder is not encoder


def test_attn_implementation_reaches_the_encoders():
    model = model_of("softmax")
    config = DualEncoderConfig.from_dict(model.config.to_dict(), attn_implementation="rfa")
    assert hf_attn.layer_names(DualEncoderModel(config).query_encoder) == ["rfa", "rfa"]
    eager = BertConfig(**BERT, attn_implementation="eager")
    assert DualEncoderConfig(query_encoder=eager).query_encoder._attn_implementation == "eager"


@pytest.mark.parametrize("document", [None, "rfa"])
def test_the_attention_of_a_model_is_switched_in_all_encoders(document, tmp_path):
    model = model_of("softmax", document)
    before = scores_of(model, batch_of())
    model.set_attn_implementation("lara")
    encoders = [e for e in (model.query_encoder, model.document_encoder) if e is not None]
    assert [hf_attn.layer_names(e) for e in encoders] == [["lara", "lara"]] * len(encoders)
    assert not torch.equal(scores_of(model, batch_of()), before)
    model.save_pretrained(tmp_path)
    loaded = DualEncoderModel.from_pretrained(tmp_path).eval()
    assert torch.equal(scores_of(loaded, batch_of()), scores_of(model, batch_of()))
    stock = model_of("bert")
    stock.set_attn_implementation("eager")
    assert stock.query_encoder.config._attn_implementation == "eager"


@backbones
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_padding_is_exact(backbone, pooling):
    model = model_of(backbone, pooling=pooling).double()
    ids = torch.randint(1, 99, (1, 7))
    alone = model.encode_documents(ids)
    padded = torch.cat([ids, torch.zeros(1, 4, dtype=torch.long)], 1)
    mask = (torch.arange(11) < 7).long()[None]
    agree(model.encode_documents(padded, mask), alone)
    other = padded.clone()
    other[:, 7:] = 42
    agree(model.encode_documents(other, mask), alone)


@pytest.mark.parametrize("name", LOSSES)
def test_a_missing_document_does_not_change_loss_or_gradients(name):
    model, batch = model_of("softmax", distill_loss=name).double(), batch_of()
    batch["labels"][2, 3] = -100

    def gradients(**given):
        model.zero_grad()
        loss = model(**given).loss
        loss.backward()
        return loss, model.query_encoder.embeddings.word_embeddings.weight.grad.clone()

    loss, gradient = gradients(**batch)
    changed = {
        **batch,
        "doc_input_ids": batch["doc_input_ids"].clone(),
        "doc_attention_mask": batch["doc_attention_mask"].clone(),
    }
    changed["doc_input_ids"][2, 3] = 7
    changed["doc_attention_mask"][2, 3] = 0
    changed["teacher_scores"] = batch["teacher_scores"].clone()
    changed["teacher_scores"][2, 3] = math.nan
    for one, other in zip((loss, gradient), gradients(**changed)):
        agree(one, other)
    assert torch.isfinite(gradient).all()


def test_pooling():
    states = normal(4, 5, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])
    assert torch.equal(pool(states, mask, "cls"), states[:, 0])
    mean, last = (pool(states, mask, how) for how in ("mean", "last"))
    for row, real in enumerate(mask.bool()[:3]):
        agree(mean[row], states[row, real].mean(0))
        assert torch.equal(last[row], states[row, real][-1])
    assert not mean[3].any() and not last[3].any()


def test_a_causal_encoder_pools_its_last_token(tmp_path):
    config = DualEncoderConfig(query_encoder=GPT2Config(**GPT2), pooling="last")
    model = DualEncoderModel(config).eval()
    assert torch.isfinite(scores_of(model, batch_of())[:2]).all()
    model.save_pretrained(tmp_path)
    assert torch.equal(
        scores_of(DualEncoderModel.from_pretrained(tmp_path).eval(), batch_of()), scores_of(model, batch_of())
    )
    with pytest.raises(Unsupported, match="pooling='last'"):
        DualEncoderModel(DualEncoderConfig(query_encoder=GPT2Config(**GPT2)))


def test_normalised_embeddings_have_length_one():
    model = model_of(normalize=True)
    agree(model.encode_queries(torch.randint(1, 99, (3, 5))).norm(dim=1), torch.ones(3), 1e-6)


def test_documents_of_other_queries_are_negatives_unless_listed_already():
    labels = torch.tensor([[1, 0], [1, 0], [0, 1]])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    # document 2 (of query 1) is the text of document 0 (of query 0); the last place is empty
    tokens = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6], [7, 8], [0, 0]])
    every, real = in_batch(labels, mask, tokens)
    for query, document in itertools.product(range(3), range(6)):
        owner = document // 2
        if owner == query:
            assert every[query, document] == labels[query, document % 2]
            assert real[query, document] == mask[query, document % 2]
        else:
            mine = [tuple(tokens[2 * query + i].tolist()) for i in range(2) if mask[query, i]]
            assert every[query, document] == 0
            assert real[query, document] == (
                bool(mask[owner, document % 2]) and tuple(tokens[document].tolist()) not in mine
            )


def test_in_batch_loss_is_that_of_all_documents():
    model, batch = model_of(in_batch_negatives=True, distill_loss="onehot"), batch_of()
    output = model(**batch)
    documents = output.doc_embeds.flatten(0, 1)
    labels = torch.block_diag(*batch["labels"].clamp(min=0))
    mask = batch["doc_mask"].flatten().expand(3, -1)
    agree(output.loss, onehot_loss(output.query_embeds @ documents.T, None, labels, mask), 1e-5)
    listed = model_of(distill_loss="onehot")
    listed.load_state_dict(model.state_dict())
    assert listed(**batch).loss < output.loss


def test_distillation_in_batch_needs_scores_of_every_pair():
    model, batch = model_of(in_batch_negatives=True), batch_of()
    with pytest.raises(InvalidInput, match="every pair"):
        model(**batch)
    every = 3 * torch.randn(3, 12)
    output = model(**{**batch, "teacher_scores": every})
    scores = output.query_embeds @ output.doc_embeds.flatten(0, 1).T
    labels = torch.block_diag(*batch["labels"].clamp(min=0))
    agree(output.loss, m3se_loss(scores, every, labels, batch["doc_mask"].flatten().expand(3, -1)), 1e-4)
    mixed = model_of(in_batch_negatives=True, alpha_onehot=0.5)
    assert torch.isfinite(mixed(**batch).loss)


def test_the_loss_is_mixed_and_the_teacher_normalised():
    batch = batch_of()
    model = model_of(alpha_onehot=0.25)
    output = model(**batch)
    given = (batch["labels"], batch["doc_mask"])
    parts = m3se_loss(output.scores, batch["teacher_scores"], *given), onehot_loss(output.scores, None, *given)
    agree(output.loss, 0.75 * parts[0] + 0.25 * parts[1], 1e-5)
    model.config.alpha_onehot, model.config.normalise_teacher = 0.0, True
    spread = batch["teacher_scores"][batch["doc_mask"]].std(correction=0)
    agree(model(**batch).loss, m3se_loss(output.scores, batch["teacher_scores"] / spread, *given), 1e-5)
    assert torch.isfinite(model(**{**batch, "teacher_scores": torch.ones(3, 4)}).loss)


def test_the_scale_is_trained_where_asked():
    model, batch = model_of(learn_score_scale=True, score_scale=4.0), batch_of()
    model(**batch).loss.backward()
    assert model.log_score_scale.grad != 0
    assert model.score_scale.item() == pytest.approx(4.0)


def test_half_precision_scores_in_float32():
    model, batch = model_of("bert").bfloat16(), batch_of()
    output = model(**batch)
    assert output.scores.dtype == torch.float32 and output.query_embeds.dtype == torch.bfloat16
    assert torch.isfinite(output.loss)


def test_gradient_checkpointing_and_tuples():
    model, batch = model_of("bert").train(), batch_of()
    expected = model.eval()(**batch)
    model.gradient_checkpointing_enable()
    loss, scores, *_ = model.train()(**batch, return_dict=False)
    loss.backward()
    assert scores.shape == expected.scores.shape


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pooling": "max"}, "pooling='max'"),
        ({"distill_loss": "rankdistil"}, "distill_loss"),
        ({"embedding_dim": 0}, "embedding_dim"),
        ({"score_scale": 0.0}, "score_scale"),
        ({"alpha_onehot": 1.5}, "alpha_onehot"),
        ({"query_encoder": {"hidden_size": 3}}, "model_type"),
        ({"query_encoder": T5Config()}, "no single encoder"),
        ({"document_encoder": BertConfig(**{**BERT, "hidden_size": 64})}, "embedding_dim"),
    ],
)
def test_refused_configs(fields, message):
    with pytest.raises((InvalidOption, Unsupported), match=message):
        DualEncoderConfig(**{"query_encoder": BertConfig(**BERT), **fields})


def test_an_encoder_of_pictures_is_refused():
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    with pytest.raises(Unsupported, match="pixel_values"):
        DualEncoderModel(DualEncoderConfig(query_encoder=config, pooling="mean"))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"doc_input_ids": None}, "encode_documents"),
        ({"doc_input_ids": torch.ones(2, 4, 9, dtype=torch.long)}, "doc_input_ids"),
        ({"doc_mask": torch.ones(3, 5, dtype=torch.bool)}, "doc_mask"),
        ({"teacher_scores": None}, "distill_loss='onehot'"),
        ({"teacher_scores": torch.zeros(3, 5)}, "teacher_scores"),
        ({"query_attention_mask": torch.ones(3, 5)}, "attention_mask"),
    ],
)
def test_refused_inputs(changes, message):
    with pytest.raises(InvalidInput, match=message):
        model_of()(**{**batch_of(), **changes})


@pytest.mark.parametrize("distill_loss", ["m3se", "onehot"])
def test_the_model_compiles_whole(distill_loss):
    encoder = BertConfig(**{**BERT, "num_hidden_layers": 1})
    fields = {"in_batch_negatives": distill_loss == "onehot", "normalise_teacher": distill_loss == "m3se"}
    model = DualEncoderModel(DualEncoderConfig(query_encoder=encoder, distill_loss=distill_loss, **fields)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")(**batch_of())
    agree(compiled.loss, model(**batch_of()).loss, 1e-5)

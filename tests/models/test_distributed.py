"""Data-parallel training: two gloo processes with half a batch each have the loss and the gradients of one."""

import pytest
import torch
import torch.distributed as dist
from helpers import BERT, GPT2, VIT
from torch.nn.parallel import DistributedDataParallel

import hf_attn

CASES = [
    ("bert", "randomized"), ("bert", "lara"), ("bert", "eva"), ("bert", "rfa"), ("bert", "topological"),
    ("vit", "randomized"), ("vit", "lara"), ("vit", "eva"), ("vit", "rfa"), ("vit", "topological"), ("vit", "ripple"),
    ("gpt2", "randomized"), ("gpt2", "eva"), ("gpt2", "rfa"), ("gpt2", "topological"),
]  # fmt: skip


def model_of(family, mechanism):
    torch.manual_seed(0)
    if family == "vit":
        return hf_attn.AttnViTForImageClassification(hf_attn.AttnViTConfig(**VIT, attn_implementation=mechanism))
    if family == "gpt2":
        config = hf_attn.AttnGPT2Config(**GPT2, attn_implementation=mechanism)
        return hf_attn.AttnGPT2ForSequenceClassification(config)
    config = hf_attn.AttnBertConfig(**BERT, attn_implementation=mechanism)
    return hf_attn.AttnBertForSequenceClassification(config)


def batch_of(family):
    generator, labels = torch.Generator().manual_seed(3), torch.tensor([0, 1, 1, 0])
    if family == "vit":
        pixels = torch.rand(4, 3, 12, 12, dtype=torch.float64, generator=generator)
        return {"pixel_values": pixels, "labels": labels}
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[1, -3:] = mask[2, -6:] = 0
    return {"input_ids": torch.randint(1, 90, (4, 10), generator=generator), "attention_mask": mask, "labels": labels}


def step(case, rank=0, processes=1):
    """Loss and gradients of this process's share; in evaluation mode, where nothing is drawn."""
    model = model_of(*case).double().eval()
    batch = {name: x.chunk(processes)[rank] for name, x in batch_of(case[0]).items()}
    wrapped = model if processes == 1 else DistributedDataParallel(model, find_unused_parameters=True)
    loss = wrapped(**batch).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def share(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = [step(case, rank, 2) for case in CASES]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(share, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(case) for case in CASES])
def test_two_processes_equal_one(number, two):
    loss, gradients = step(CASES[number])
    torch.testing.assert_close((two[0][number][0] + two[1][number][0]) / 2, loss, rtol=1e-10, atol=1e-12)
    for results in two:
        found = results[number][1]
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10, msg=name)

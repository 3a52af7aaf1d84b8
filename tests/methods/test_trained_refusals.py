"""Bad configurations fail before training, with one sentence that says what, where and how to mend it."""

from __future__ import annotations

import warnings

import pytest
import torch
from trained import batch_of, tasks, wrapped

import coterie
from coterie.experts.bank import BankShape
from coterie.experts.fresh import Fresh
from coterie.methods.registry import Mixture
from coterie.mixture.layer import add_experts
from coterie.routing.router import Routing
from zoo import base_model

LINEAR = Routing(score="linear", select="softmax")


def wrap(arch="bert", **keys):
    return coterie.wrap(base_model(arch), coterie.MixtureConfig(**keys))


def by_hand(experts=3, arch="bert", fresh=None, **routing):
    return wrap(arch, method=Mixture(fresh or Fresh(4), Routing(**routing)), experts=experts)


REFUSED = {
    "unknown layer": (lambda: wrap(modules={"include": ["*quary"]}), "quary"),
    "unknown layer to leave out": (lambda: wrap(modules={"exclude": ["*quary"]}), "quary"),
    "unknown layer among known": (lambda: wrap(modules={"include": ["*query", "*quary"]}), "quary"),
    "rank 0": (lambda: wrap(parameters={"rank": 0}), "rank is 0"),
    "rank that is no number": (lambda: wrap(parameters={"rank": "four"}), "rank is 'four'"),
    "rank 0 by hand": (lambda: by_hand(fresh=Fresh(0), score="linear", select="softmax"), "rank is 0"),
    "top_k": (lambda: wrap(method="switch", experts=3, parameters={"top_k": 4}), "top_k is 4 and there are 3 experts"),
    "top_k by hand": (lambda: by_hand(score="linear", select="top_k", k=4), "top_k is 4 and there are 3 experts"),
    "no experts": (lambda: wrap(experts=0), "experts is 0"),
    "fewer than none": (lambda: wrap(experts=-2), "experts is -2"),
    "no names": (lambda: wrap(experts=[]), "experts is"),
    "names twice": (lambda: wrap(experts=["a", "b", "a"]), "unlike names"),
    "all experts dropped": (lambda: wrap(parameters={"expert_dropout": 1.0}), "expert_dropout is 1.0"),
    "all dropped by hand": (
        lambda: by_hand(score="linear", select="softmax", pool="sequence", select_options={"dropout": 1.0}),
        "dropout is 1.0",
    ),
    "all dropped by hand, top k": (
        lambda: by_hand(score="linear", select="top_k", select_options={"dropout": 1.0}),
        "dropout is 1.0",
    ),
    "dropout of the experts' input": (lambda: wrap(parameters={"dropout": 1.0}), "dropout is 1.0"),
    "MHR's splits": (lambda: wrap(method="mhr", parameters={"splits": 5}), "5 splits do not divide"),
    "unknown activation": (
        lambda: by_hand(fresh=Fresh(4, "bottleneck", activation="swosh"), score="linear", select="softmax"),
        "unknown activation 'swosh'",
    ),
    "unknown method": (lambda: wrap(method="smeer"), "unknown method 'smeer'"),
    "a built method": (lambda: wrap(method="smile"), "built from experts and not trained"),
    "unknown parameter": (lambda: wrap(parameters={"ranks": 3}), "unknown parameter 'ranks'"),
    "unknown key": (lambda: wrap(layers=["*"]), "layers"),
    "unknown expert kind": (lambda: wrap(parameters={"expert": "adapter"}), "expert is 'adapter'"),
    "unknown also_train": (lambda: wrap(also_train=["*klassifier*"]), "klassifier"),
    "a task's expert": (lambda: wrap(method="tag", experts=2, parameters={"share": [0, 2]}), r"share is \[0, 2\]"),
    "several for single": (lambda: wrap(method="single", experts=["a", "b"]), "single has one expert"),
    "no config": (lambda: coterie.wrap(base_model("bert")), "has no experts yet"),
    "config for a mixture": (lambda: coterie.wrap(wrapped("bert", "smear"), train="nobody"), "train is 'nobody'"),
    "nothing to train": (
        lambda: (
            coterie.wrap(base_model("bert"), coterie.MixtureConfig(method="hash"), train="routers")
            and coterie.wrap(base_model("bert"), coterie.MixtureConfig(method="hash", also_train=[]), train="routers")
        ),
        "nothing to train",
    ),
    "looking ahead": (lambda: wrap("gpt2"), "look ahead"),
    "a pool that the choice cannot take": (
        lambda: by_hand(score="linear", select="reinforce", pool="token"),
        "reinforce",
    ),
    "an unknown loss": (
        lambda: by_hand(score="linear", select="top_k", losses={"balence": 0.1}),
        "no loss 'balence' .*known: balance, z",
    ),
    "a loss where no layer decides": (
        lambda: by_hand(score="soft", select="given", combine="slots", losses={"z": 0.1}),
        "no loss 'z'",
    ),
    "nobody answers": (lambda: by_hand(score="linear", select="top_k", k=0), "k is 0"),
    "a config that is none": (lambda: coterie.wrap(base_model("bert"), {"method": "smear"}), "and a dict"),
    "a name for a model": (lambda: coterie.wrap("bert", coterie.MixtureConfig()), "got a str"),
    "layers of a mixture": (
        lambda: coterie.wrap(
            wrapped("bert", "smear"), coterie.MixtureConfig(experts=3, modules={"include": ["*query"]})
        ),
        "a mixture has its layers",
    ),
    "unknown score": (lambda: Routing(score="lineal", select="softmax"), "unknown score 'lineal'"),
    "segments of nothing": (
        lambda: by_hand(score="linear", select="softmax", pool="segment"),
        "segment is 0",
    ),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_wrapping_refuses(case):
    run, words = REFUSED[case]
    with pytest.raises(coterie.CoterieError, match=words) as caught:
        run()
    assert "\n" not in str(caught.value) and caught.value.mend


def test_factors_of_unequal_ranks():
    shape = BankShape((0, 1), (2, 4))
    with pytest.raises(coterie.CoterieError, match=r"ranks are \[2, 4\]"):
        add_experts(torch.nn.Linear(6, 6), shape, Routing("linear", "softmax", pool="sequence", combine="factors"))
    add_experts(torch.nn.Linear(6, 6), shape, LINEAR)


CALLS = {
    "no tasks": ("tag", {}, "the call names none"),
    "no tasks for poly": ("poly", {}, "the call names none"),
    "a task too many": ("tag", {"task_ids": torch.tensor([0, 1, 3])}, "task_ids go from 0 to 3, and there are 3 tasks"),
    "a task below none": ("poly", {"task_ids": torch.tensor([0, -1, 1])}, "task_ids go from -1 to 1"),
    "too few tasks": ("mhr", {"task_ids": torch.tensor([0, 1])}, r"task_ids has shape \(2,\)"),
    "tasks that are no numbers": ("tag", {"task_ids": torch.rand(3)}, "float32"),
    "tasks of one-hot": ("tag", {"task_ids": torch.eye(3).long()}, r"shape \(3, 3\)"),
    "tasks by name": ("tag", {"task_ids": ["a", "b", "c"]}, "task_ids is \"\\['a', 'b', 'c'\\]\""),
    "a label of no class": ("smear", {"labels": torch.tensor([0, 1, 3])}, "label 3 is none of 3 classes"),
    "a label below none": ("switch", {"labels": torch.tensor([0, -2, 1])}, "label -2 is none of 3 classes"),
}


@pytest.mark.parametrize("case", list(CALLS))
def test_calls_refuse(case):
    method, more, words = CALLS[case]
    model = wrapped("bert", method)
    with pytest.raises(coterie.CoterieError, match=words):
        model(**{**batch_of("bert", labels=True), **more})
    good = {**batch_of("bert", labels=True), "task_ids": tasks()}
    assert torch.isfinite(model(**good).loss)


def test_a_prompt_must_be_known():
    model = wrapped("llama", "smear", pool="prompt").eval()
    given = batch_of("llama", padding="")
    for more in ({}, {"labels": given["input_ids"]}, {"prompt_lengths": torch.tensor([0, 1, 2])}):
        with pytest.raises(coterie.CoterieError, match="does not say where it ends"):
            model(**given, **more)
    for lengths in (torch.tensor([1]), torch.rand(3)):
        with pytest.raises(coterie.CoterieError, match="prompt_lengths has shape"):
            model(**given, prompt_lengths=lengths)


@pytest.mark.parametrize(("method", "arch"), [("smear", "bert"), ("tag", "bert"), ("soft_moe", "bert"), ("poly", "t5")])
def test_a_part_that_is_called_by_itself(method, arch):
    """A sub-model has no mask of its own to read; an encoder-decoder's encoder has, for `generate` calls it so."""
    model = wrapped(arch, method).eval()
    given = batch_of(arch)
    part = model.bert if arch == "bert" else model.decoder
    names = ("input_ids", "attention_mask")
    with pytest.raises(coterie.CoterieError, match="a part of a mixture was called"):
        part(**{k: given[k] for k in names})
    if arch == "t5":
        states = model.get_encoder()(**{k: given[k] for k in names}, task_ids=tasks())
        whole = {**given, "task_ids": tasks()}
        with torch.no_grad():
            wanted = model(**whole).logits
            del whole["input_ids"]
            assert torch.allclose(model(**whole, encoder_outputs=states).logits, wanted, atol=1e-6)


def test_a_part_that_trains_by_itself_says_so():
    """Token routers need no call, but their losses do."""
    model, given = wrapped("bert", "switch"), batch_of("bert")
    with pytest.warns(UserWarning, match=r"a part of the mixture was called.*balance, z"):
        model.bert(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped("bert", "switch")(**batch_of("bert", labels=True))
        with torch.no_grad():
            wrapped("bert", "switch").bert(**given)


def test_torchs_data_parallel_is_refused():
    with pytest.raises(coterie.CoterieError, match="torchrun"):
        wrapped("bert", "smear")._replicate_for_data_parallel()  # what DataParallel calls for each device


@pytest.mark.parametrize("pool", ["prompt", "segment"])
def test_a_prompt_in_chunks_is_refused(pool):
    model, ids = wrapped("llama", "smear", pool=pool).eval(), batch_of("llama")["input_ids"][:1]
    whole = model.generate(ids, max_new_tokens=2, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=64), whole)
    with pytest.raises(coterie.CoterieError, match="first chunk alone"):
        model.generate(ids, max_new_tokens=2, prefill_chunk_size=2)
    token = wrapped("llama", "switch").eval()
    whole = token.generate(ids, max_new_tokens=2, do_sample=False)
    assert torch.equal(token.generate(ids, max_new_tokens=2, do_sample=False, prefill_chunk_size=2), whole)


def test_states_of_another_encoder():
    model = wrapped("t5", "hash").eval()
    given = batch_of("t5")
    states = base_model("t5").get_encoder()(given["input_ids"], attention_mask=given["attention_mask"])
    with pytest.raises(coterie.CoterieError, match="encoder_outputs"):
        model(encoder_outputs=states, decoder_input_ids=given["decoder_input_ids"])


def test_no_input():
    with pytest.raises(coterie.CoterieError, match="has no input"):
        wrapped("bert", "smear")()


def test_layers_that_do_not_see_whole_examples():
    """Windows of an image are no examples: their layers cannot be pooled, and the error says how to leave them out."""
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, num_labels=3
    )
    dense = SwinForImageClassification(config).eval()
    model = coterie.wrap(dense, coterie.MixtureConfig(method="smear", experts=2, parameters={"rank": 2}))
    with pytest.raises(coterie.CoterieError, match=r"rows, and the call has 2 examples; leave"):
        model(pixel_values=torch.randn(2, 3, 16, 16))
    config = coterie.MixtureConfig(
        method="smear", experts=2, parameters={"rank": 2}, modules={"include": ["*downsample.reduction"]}
    )
    assert coterie.wrap(dense, config)(pixel_values=torch.randn(2, 3, 16, 16)).logits.shape == (2, 3)


def test_a_decoder_without_a_head_is_causal_too():
    from transformers import BertModel, LlamaModel

    from coterie.mixture.kinds import is_causal
    from zoo import base_model

    llama, bert = base_model("llama"), base_model("bert")
    assert is_causal(llama) and is_causal(LlamaModel(llama.config))
    assert not is_causal(bert) and not is_causal(BertModel(bert.config))
    with pytest.raises(coterie.CoterieError, match="look ahead"):
        coterie.wrap(LlamaModel(llama.config), coterie.MixtureConfig(method="smear", experts=2))

"""Every tensor out that went in, under its Hub name, whatever transformers makes of it in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import coterie
from coterie.merging.vocabulary import Vocabulary
from zoo import ARCHS, base_model, fine_tune, inputs, load_dense, make_adapter, merged, outputs, save


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def deepseek(seed: int) -> Any:
    torch.manual_seed(seed)
    config = tf.DeepseekV3Config(
        vocab_size=48, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        n_group=2, topk_group=1, first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=8, max_position_embeddings=32,
    )  # fmt: skip
    return tf.DeepseekV3ForCausalLM(config)


def write(root: Path, arch: str) -> dict[str, Any]:
    """A base and two fine-tunes of everything; the recipe of a merge."""
    if arch == "deepseek_v3":
        for seed, name in enumerate(("base", "a", "b")):
            deepseek(seed).save_pretrained(root / name)
    else:
        base = base_model(arch)
        save(base, root / "base")
        for seed, name in enumerate(("a", "b")):
            save(fine_tune(base, seed, everything=True), root / name)
    return {"base": str(root / "base"), "experts": {name: str(root / name) for name in ("a", "b")}}


@pytest.mark.parametrize("arch", [*ARCHS, "deepseek_v3"])
def test_every_tensor_out_that_went_in(tmp_path, arch):
    sources = write(tmp_path, arch)
    report = coterie.merge(method="average", out=tmp_path / "out", **sources)
    base, a, b, out = (tensors(tmp_path / name) for name in ("base", "a", "b", "out"))
    assert {n: t.shape for n, t in out.items()} == {n: t.shape for n, t in base.items()}
    assert len(report.lines) + len(report.kept) == len(base)
    for name, value in out.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (a[name] + b[name]) / 2, rtol=0, atol=1e-6)
    cls = getattr(tf, report.architecture)
    _, info = cls.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def resnets(root: Path, heads: tuple[int, int] = (3, 3)) -> dict[str, Any]:
    """A base without any linear layer in its body, and two experts that counted their training steps on."""
    for seed, (name, labels) in enumerate(zip(("base", "a", "b"), (heads[0], *heads), strict=True)):
        torch.manual_seed(seed)
        config = tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=labels)
        model = tf.ResNetForImageClassification(config)
        for key, tensor in model.state_dict().items():
            if key.endswith("num_batches_tracked"):
                tensor.fill_(100 * seed)
            elif "running" in key:
                tensor.uniform_(0.5, 1.5)
        model.save_pretrained(root / name)
    return {"base": str(root / "base"), "experts": {name: str(root / name) for name in ("a", "b")}}


@pytest.mark.parametrize("method", ["average", "ties", "model_stock"])
def test_batch_norm_and_no_linear_layer(tmp_path, method):
    """The counts of training steps are the base's; a merge of any tensor needs no linear layer, also with a head."""
    sources = resnets(tmp_path, (3, 5))
    report = coterie.merge(method=method, head="b", out=tmp_path / "out", **sources)
    base, a, b, out = (tensors(tmp_path / name) for name in ("base", "a", "b", "out"))
    counts = [name for name in base if name.endswith("num_batches_tracked")]
    assert counts and all(out[name].equal(base[name]) for name in counts)
    assert {report.kept[name] for name in counts} == {"count of training steps, the base's"}
    assert out["classifier.1.weight"].equal(b["classifier.1.weight"])
    if method == "average":
        for name in set(base) - set(counts):
            if "classifier" not in name:
                torch.testing.assert_close(out[name], (a[name] + b[name]) / 2, rtol=0, atol=1e-6)
    tf.AutoModelForImageClassification.from_pretrained(tmp_path / "out")


def test_what_a_model_without_linear_layers_is_refused(tmp_path):
    sources = resnets(tmp_path)
    with pytest.raises(coterie.CoterieError, match=r"no linear layer is left that iso_c could merge.*task_arithmetic"):
        coterie.merge(method="iso_c", out=tmp_path / "out", **sources)
    far = {"method": "task_arithmetic", "parameters": {"scale": 30.0}, **sources}
    with pytest.raises(coterie.CoterieError, match="negative variances"):
        coterie.merge(out=tmp_path / "out", **far)
    coterie.merge(out=tmp_path / "out", others={"*.running_*": "average"}, **far)


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt2", "vit"])
def test_methods_for_matrices_see_the_linear_layers(tmp_path, arch):
    sources = write(tmp_path, arch)
    report = coterie.merge(method="iso_c", out=tmp_path / "out", **sources)
    assert set(tensors(tmp_path / "out")) == set(tensors(tmp_path / "base"))
    methods = {line.name: line.method for line in report.lines}
    experts = [name for name in methods if ".experts." in name]
    assert all(methods[name] == "iso_c" for name in experts)
    assert bool(experts) == (arch in ("mixtral", "qwen3_moe", "deepseek_v3"))
    attention = [
        n for n in methods if n.endswith(("q_proj.weight", "c_attn.weight", "query.weight", "q_a_proj.weight"))
    ]
    assert attention and all(methods[name] == "iso_c" for name in attention)
    rest = [n for n, shape in ((line.name, line.shape) for line in report.lines) if len(shape) == 1 or "embed" in n]
    assert all(methods[name] == "average" for name in rest)


def test_conv1d_is_seen_transposed(tmp_path, monkeypatch):
    """GPT-2 keeps (in, out): the merge sees (out, in), and its result is written as (in, out) again."""
    from coterie.merging import registry

    monkeypatch.setattr(registry, "_MERGES", dict(registry._MERGES))
    seen = set()

    @registry.merge_method("probe", cite="-", acts_on="matrix")
    def probe(deltas: Tensor) -> Tensor:
        """The first delta."""
        seen.add(tuple(deltas.shape[1:]))
        return deltas[0]

    sources = write(tmp_path, "gpt2")
    coterie.merge(method="probe", out=tmp_path / "out", modules={"include": ["*c_fc"]}, **sources)
    assert seen == {(128, 32)}
    name = "transformer.h.0.mlp.c_fc.weight"
    torch.testing.assert_close(tensors(tmp_path / "out")[name], tensors(tmp_path / "a")[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("arch", ["mixtral", "qwen3_moe", "gpt2", "bert", "vit", "t5"])
def test_an_adapter_of_any_architecture(tmp_path, arch):
    """Where an adapter takes part the skeleton is asked, and Hub names come out all the same."""
    sources = write(tmp_path, arch)
    make_adapter(tmp_path / "base", tmp_path / "adapter", 3, arch=arch)
    sources["experts"] = {"adapter": str(tmp_path / "adapter"), "a": str(tmp_path / "a")}
    coterie.merge(method="task_arithmetic", parameters={"scale": 1.0}, out=tmp_path / "out", **sources)
    assert set(tensors(tmp_path / "out")) == set(tensors(tmp_path / "base"))
    base, out, a = (load_dense(tmp_path / name, arch).state_dict() for name in ("base", "out", "a"))
    whole = merged(tmp_path / "base", tmp_path / "adapter", arch).state_dict()
    for name, own in base.items():
        if own.is_floating_point():
            torch.testing.assert_close(out[name], whole[name] + a[name] - own, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", ["concatenate", "squeeze", "lego"])
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_adapters_to_an_adapter_that_peft_loads(tmp_path, arch, method):
    base = base_model(arch)
    save(base, tmp_path / "base")
    for seed, (name, rank) in enumerate((("a", 3), ("b", 5))):
        targets = None if seed else ARCHS[arch].targets[:1]
        make_adapter(tmp_path / "base", tmp_path / name, seed, rank, targets, arch=arch)
    experts = {"a": {"source": str(tmp_path / "a"), "weight": 0.5}, "b": str(tmp_path / "b")}
    keys = {"method": method, "base": str(tmp_path / "base"), "experts": experts}
    report = coterie.merge(keys, out=tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()
    found = merged(tmp_path / "base", tmp_path / "out", arch).state_dict()
    a, b = (merged(tmp_path / "base", tmp_path / name, arch).state_dict() for name in ("a", "b"))
    own = load_dense(tmp_path / "base", arch).state_dict()
    moved = {name: found[name] - own[name] for name in own if not found[name].equal(own[name])}
    assert len(moved) == len(report.lines) == 2 * len(ARCHS[arch].targets)
    if method == "concatenate":
        for name in own:
            wanted = own[name] + 0.5 * (a[name] - own[name]) + (b[name] - own[name])
            torch.testing.assert_close(found[name], wanted, rtol=0, atol=2e-6)
    for line in report.lines:
        assert line.merged == pytest.approx(float(moved[line.name].norm()), rel=1e-3)
        assert line.experts[0] == pytest.approx(float((a[line.name] - own[line.name]).norm()), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("trained", ["lora_only", "all"])
def test_biases_beside_factors_come_from_the_named_adapter(tmp_path, trained):
    save(base_model("bert"), tmp_path / "base")
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / "base", tmp_path / name, seed, arch="bert", bias=trained)
    experts = {name: str(tmp_path / name) for name in "ab"}
    keys = {"method": "concatenate", "base": str(tmp_path / "base"), "experts": experts, "head": "b"}
    report = coterie.merge(keys, out=tmp_path / "out")
    found = merged(tmp_path / "base", tmp_path / "out", "bert").state_dict()
    a, b = (merged(tmp_path / "base", tmp_path / name, "bert").state_dict() for name in "ab")
    own = load_dense(tmp_path / "base", "bert").state_dict()
    for name in own:
        wanted = b[name] if name.endswith("bias") else a[name] + b[name] - own[name]
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=2e-6)
    assert set(report.left_out["expert a"]) == set(report.kept) and not report.left_out["expert b"]


def test_a_merge_answers_as_its_state_does(tmp_path):
    sources = write(tmp_path, "bert")
    coterie.merge(method="task_arithmetic", parameters={"scale": 0.5}, out=tmp_path / "out", **sources)
    model = load_dense(tmp_path / "base", "bert")
    a, b = (load_dense(tmp_path / name, "bert").state_dict() for name in ("a", "b"))
    model.load_state_dict({n: t + 0.5 * (a[n] + b[n] - 2 * t) for n, t in model.state_dict().items()})
    torch.testing.assert_close(
        outputs(load_dense(tmp_path / "out", "bert"), inputs("bert")), outputs(model, inputs("bert"))
    )


# --- heads --------------------------------------------------------------------------------------------------------


def heads(root: Path) -> dict[str, Any]:
    """A base without a head, and two experts with 3 and 5 classes of their own names."""
    base = base_model("bert")
    base.bert.save_pretrained(root / "base")
    for seed, (name, labels) in enumerate((("a", 3), ("b", 5))):
        model = base_model("bert", seed=9, num_labels=labels)
        model.load_state_dict({n: t for n, t in base.state_dict().items() if "classifier" not in n}, strict=False)
        tuned = fine_tune(model, seed)
        tuned.config.id2label = {i: f"{name}{i}" for i in range(labels)}
        tuned.config.label2id = {f"{name}{i}": i for i in range(labels)}
        save(tuned, root / name)
    return {"base": str(root / "base"), "experts": {name: str(root / name) for name in ("a", "b")}}


def test_a_head_is_taken_by_name(tmp_path):
    sources = heads(tmp_path)
    report = coterie.merge(method="average", head="b", out=tmp_path / "out", **sources)
    assert report.kept == dict.fromkeys(("classifier.weight", "classifier.bias"), "the head of 'b'")
    out, a, b = (tensors(tmp_path / name) for name in ("out", "a", "b"))
    assert out["classifier.weight"].equal(b["classifier.weight"])
    name = "bert.encoder.layer.0.output.dense.weight"
    torch.testing.assert_close(out[name], (a[name] + b[name]) / 2)
    model = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.id2label == {i: f"b{i}" for i in range(5)}
    with pytest.raises(coterie.CoterieError, match="head: a"):
        coterie.merge(method="average", out=tmp_path / "refused", **sources)


def test_a_head_of_equal_shape_is_taken_by_name(tmp_path):
    sources = write(tmp_path, "bert")
    coterie.merge(method="average", head="b", out=tmp_path / "out", **sources)
    out, b = tensors(tmp_path / "out"), tensors(tmp_path / "b")
    assert out["classifier.weight"].equal(b["classifier.weight"])


def test_tied_tensors_stay_tied(tmp_path):
    """A random method merges what is tied once, whichever names a checkpoint holds."""
    sources = write(tmp_path, "gpt2")

    def rewrite(name: str, **changes: Tensor) -> None:
        save_file(tensors(tmp_path / name) | changes, tmp_path / name / "model.safetensors", {"format": "pt"})

    wte = "transformer.wte.weight"
    for name in ("a", "b"):
        own = tensors(tmp_path / name)[wte]
        rewrite(name, **{wte: own + 0.1 * torch.randn_like(own)})
    coterie.merge(method="dare", out=tmp_path / "out", **sources)
    model = load_dense(tmp_path / "out", "gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    for name in ("base", "a", "b"):
        rewrite(name, **{"lm_head.weight": tensors(tmp_path / name)[wte]})
    coterie.merge(method="dare", out=tmp_path / "both", **sources)
    both, one = tensors(tmp_path / "both"), tensors(tmp_path / "out")
    assert both["lm_head.weight"].equal(both[wte])
    assert both[wte].equal(one[wte])


# --- vocabularies -------------------------------------------------------------------------------------------------


def tokenizer(folder: Path, words: list[str]) -> None:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


WORDS = {"base": ["[UNK]", "one", "two"], "a": ["[UNK]", "two", "one", "three"], "b": ["[UNK]", "one", "three", "four"]}


def vocabularies(root: Path, tied: bool = False) -> dict[str, Any]:
    """Three models that number their words in their own ways; the base has two rows of padding."""
    for seed, (name, words) in enumerate(WORDS.items()):
        rows = len(words) + (2 if name == "base" else 0)
        model = base_model("llama", seed=seed, vocab_size=rows, tie_word_embeddings=tied, pad_token_id=None)
        save(model, root / name)
        tokenizer(root / name, words)
    return {"base": str(root / "base"), "experts": {name: str(root / name) for name in ("a", "b")}}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_union_of_vocabularies(tmp_path, tied):
    sources = vocabularies(tmp_path, tied)
    sources["experts"]["a"] = {"source": str(tmp_path / "a"), "weight": 2.0}
    keys = {"method": "task_arithmetic", "parameters": {"scale": 0.5}, **sources}
    report = coterie.merge(vocabulary="union", out=tmp_path / "out", **keys)
    base, a, b, out = (tensors(tmp_path / name) for name in ("base", "a", "b", "out"))
    assert set(out) == set(base)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name not in base:
            continue
        w, x, y, z = base[name], a[name], b[name], out[name]
        assert len(z) == 5
        wanted = [
            w[0] + 0.5 * (2 * (x[0] - w[0]) + y[0] - w[0]),  # [UNK]
            w[1] + 0.5 * (2 * (x[2] - w[1]) + y[1] - w[1]),  # one: a calls it 2
            w[2] + x[1] - w[2],  # two: b has none
            (x[3] + y[2]) / 2,  # three: in the place of a row of padding
            y[3],  # four
        ]
        torch.testing.assert_close(z, torch.stack(wanted), rtol=0, atol=1e-6)
    found = tf.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found("two one three four", add_special_tokens=False)["input_ids"] == [2, 1, 3, 4]
    model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 5
    assert any("2 tokens" in warning for warning in report.warnings)


@pytest.mark.parametrize("vocabulary", ["union", "base"])
def test_what_is_tied_to_the_output_has_its_rows(tmp_path, vocabulary):
    """BERT's decoder: its weight is the embedding's, its bias that of the module around it."""
    for seed, (name, words) in enumerate(WORDS.items()):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        model = tf.BertForMaskedLM(tf.BertConfig(vocab_size=len(words), **sizes))
        torch.nn.init.normal_(model.cls.predictions.bias)
        model.save_pretrained(tmp_path / name)
        tokenizer(tmp_path / name, words)
    experts = {name: str(tmp_path / name) for name in ("a", "b")}
    keys = {"method": "average", "base": str(tmp_path / "base"), "experts": experts, "vocabulary": vocabulary}
    report = coterie.merge(keys, out=tmp_path / "out")
    w, x, y, z = (tensors(tmp_path / name)["cls.predictions.bias"] for name in ("base", "a", "b", "out"))
    wanted = [(x[0] + y[0]) / 2, (x[2] + y[1]) / 2, (x[1] + w[2]) / 2, (x[3] + y[2]) / 2, y[3]]
    wanted = torch.stack(wanted)[: 5 if vocabulary == "union" else 3]
    torch.testing.assert_close(z, wanted, rtol=0, atol=1e-6)
    assert any("takes the base's" in warning for warning in report.warnings) == (vocabulary == "base")
    model, info = tf.BertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["mismatched_keys"] and model.cls.predictions.decoder.bias is model.cls.predictions.bias


def test_the_base_of_vocabularies(tmp_path):
    sources = vocabularies(tmp_path)
    coterie.merge(method="average", vocabulary="base", out=tmp_path / "out", **sources)
    base, a, b, out = (tensors(tmp_path / name)["lm_head.weight"] for name in ("base", "a", "b", "out"))
    assert out.shape == base.shape
    torch.testing.assert_close(out[1], (a[2] + b[1]) / 2, rtol=0, atol=1e-6)
    torch.testing.assert_close(out[2], (a[1] + base[2]) / 2, rtol=0, atol=1e-6)
    assert out[3:].equal(base[3:])


def test_vocabularies_that_differ_are_refused(tmp_path):
    sources = vocabularies(tmp_path)
    with pytest.raises(coterie.CoterieError, match="tokenizer differs from the base's in 3 tokens"):
        coterie.merge(method="average", out=tmp_path / "out", **sources)


def test_narrower_rows_that_are_unchanged_bring_no_rounding():
    own, theirs = torch.randn(3, 4), torch.randn(4, 4)
    vocabulary = Vocabulary({"x": 0, "y": 1, "z": 2}, [{"n": 0, "z": 1, "x": 2, "y": 3}], {"n": 3})
    theirs[[2, 1]] = own[[0, 2]]
    base, (rows,) = vocabulary.align(own, [theirs.bfloat16()], has_base=True)
    assert torch.equal(rows[[0, 2, 3]], base[[0, 2, 3]]) and torch.equal(base[:3], own)
    assert torch.equal(rows[1], theirs[3].bfloat16().float())


def test_aligned_rows_without_a_base():
    found = Vocabulary({"x": 0, "y": 1}, [{"x": 0, "y": 1}, {"y": 0, "z": 1}], {"z": 2})
    first, second = torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [8.0]])
    _, aligned = found.align(first, [first, second], has_base=False)
    assert torch.stack([t for t in aligned if t is not None])[:, :, 0].tolist() == [[1, 2, 8], [1, 4, 8]]

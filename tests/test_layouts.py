"""Checkpoints as they lie on the Hub: other names, other prefixes, leftovers of older versions, parts of models."""

from __future__ import annotations

import json
import re
import warnings

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import coterie
from coterie.errors import CoterieError
from matching import assert_matches, build, relative_error
from reference import from_adapter, from_model
from zoo import ALL, ARCHS, base_model, body_linears, fine_tune, inputs, make_adapter, outputs, save

PARAMETERS = {"rank": 6, "gate_rank": 4}


def rewrite(path, change, name="model.safetensors"):
    """Replace the tensors of a checkpoint by ``change(tensors)``."""
    tensors = change(load_file(path / name))
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path / name, metadata={"format": "pt"})


def sources(arch, tmp_path, **options):
    """A base and two fine-tunes on disk, and what they are."""
    base = base_model(arch)
    tuned = {f"e{s}": fine_tune(base, s, **options) for s in (1, 2)}
    save(base, tmp_path / "base")
    for name, model in tuned.items():
        save(model, tmp_path / name)
    return base, tuned, {n: tmp_path / n for n in tuned}


def check(mixture, arch, base, tuned):
    experts = [from_model(base, t, ARCHS[arch].heads) for t in tuned.values()]
    assert_matches(mixture, base, experts, body_linears(arch, base), inputs(arch), **PARAMETERS)


@pytest.mark.parametrize("arch", ALL)
def test_what_is_written_bears_the_names_of_the_hub(arch, tmp_path):
    """Every tensor of the base's file is in the mixture's, under its module's name on disk.

    Only the weights of mixture layers, and heads, which are kept per expert, may be called otherwise.
    """
    _, _, paths = sources(arch, tmp_path)
    mixture = build(tmp_path / "out", tmp_path / "base", paths, parameters=PARAMETERS)
    ours = {k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()}
    theirs = load_file(tmp_path / "base" / "model.safetensors")
    modules = {k.rpartition(".")[0] for k in ours}
    renamed = 0
    for name, tensor in theirs.items():
        module, leaf = name.rpartition(".")[::2]
        if module.split(".")[0] in ARCHS[arch].heads:
            continue
        assert module in modules, name
        if name not in ours:
            renamed += 1
            assert leaf == "weight"
            inside = [v for k, v in ours.items() if k.startswith(f"{module}.") and v.shape == tensor.shape]
            assert any(torch.equal(v, tensor) for v in inside), name
        else:
            assert torch.equal(ours[name], tensor), name
    assert renamed in (0, len(body_linears(arch, base_model(arch))))
    assert list(mixture.coterie.expert_names) == ["e1", "e2"]


def without_prefix(prefix):
    return lambda tensors: {k.removeprefix(prefix): v for k, v in tensors.items()}


def test_gpt2_as_it_lies_on_the_hub(tmp_path):
    """No `transformer.` prefix, causal masks among the tensors."""
    base, tuned, paths = sources("gpt2", tmp_path)

    def old(tensors):
        tensors = without_prefix("transformer.")(tensors)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
            tensors[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        return tensors

    rewrite(tmp_path / "base", old)
    rewrite(paths["e1"], old)
    check(build(tmp_path / "out", tmp_path / "base", paths, parameters=PARAMETERS), "gpt2", base, tuned)


def test_bert_with_position_ids_and_old_norm_names(tmp_path):
    base, tuned, paths = sources("bert", tmp_path)

    def old(tensors):
        tensors = {
            re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", k)): v
            for k, v in tensors.items()
        }
        tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]
        return tensors

    rewrite(tmp_path / "base", old)
    rewrite(paths["e2"], old)
    check(build(tmp_path / "out", tmp_path / "base", paths, parameters=PARAMETERS), "bert", base, tuned)


def test_llama_with_rotary_frequencies_on_disk(tmp_path):
    base, tuned, paths = sources("llama", tmp_path)

    def old(tensors):
        extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
        return {**tensors, **extra}

    rewrite(tmp_path / "base", old)
    rewrite(paths["e1"], old)
    check(build(tmp_path / "out", tmp_path / "base", paths, parameters=PARAMETERS), "llama", base, tuned)


def test_t5_with_every_copy_of_its_embedding_on_disk(tmp_path):
    base, tuned, paths = sources("t5", tmp_path)

    def copies(tensors):
        shared = tensors["shared.weight"]
        names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
        return {**tensors, **dict.fromkeys(names, shared)}

    rewrite(tmp_path / "base", copies)
    rewrite(paths["e1"], copies)
    check(build(tmp_path / "out", tmp_path / "base", paths, parameters=PARAMETERS), "t5", base, tuned)


def test_a_masked_language_model_as_the_base_of_classifiers(tmp_path):
    """bert-base-uncased holds a language-model head; its classifiers do not. The class is the experts'."""
    base, tuned, paths = sources("bert", tmp_path)
    pretrained = tf.BertForMaskedLM(base.config)
    missing = pretrained.bert.load_state_dict({k: v for k, v in base.bert.state_dict().items() if "pooler" not in k})
    assert not missing.missing_keys
    pretrained.save_pretrained(tmp_path / "mlm")

    def with_pooler(tensors):
        return {**tensors, **{f"bert.pooler.{k}": v for k, v in base.bert.pooler.state_dict().items()}}

    rewrite(tmp_path / "mlm", with_pooler)
    mixture = build(tmp_path / "out", tmp_path / "mlm", paths, parameters=PARAMETERS)
    assert isinstance(mixture, tf.BertForSequenceClassification)
    check(mixture, "bert", base, tuned)


def test_bare_encoders_of_a_classifiers_base(tmp_path):
    """Experts saved as BertModel bear no `bert.` prefix; asked for as BertModel they make a BertModel."""
    base, tuned, _ = sources("bert", tmp_path)
    paths = {n: save(t.bert, tmp_path / f"bare-{n}") for n, t in tuned.items()}
    mixture = build(tmp_path / "out", tmp_path / "base", paths, parameters=PARAMETERS, architecture="BertModel")
    assert isinstance(mixture, tf.BertModel)
    experts = [from_model(base.bert, t.bert) for t in tuned.values()]
    layers = [n.removeprefix("bert.") for n in body_linears("bert", base)]
    assert_matches(mixture, base.bert, experts, layers, inputs("bert"), **PARAMETERS)


def test_vision_towers_of_clip(tmp_path):
    """The layout of the paper's CLIP suite: a whole CLIP as base, vision towers as experts."""
    base = base_model("clip")
    save(base, tmp_path / "base")
    gen = torch.Generator().manual_seed(0)
    tuned, paths = [], {}
    config = tf.CLIPVisionConfig(**base.config.vision_config.to_dict())
    start = tf.CLIPVisionModel(config).eval()
    tower = {k.removeprefix("vision_model."): v for k, v in base.vision_model.state_dict().items()}
    own = start.state_dict()
    start.load_state_dict({k: tower[k.removeprefix("vision_model.")] for k in own})
    for seed in (1, 2):
        expert = tf.CLIPVisionModel(config).eval()
        expert.load_state_dict(start.state_dict())
        with torch.no_grad():
            for name, p in expert.named_parameters():
                if "proj" in name or "fc" in name:
                    p.add_(0.1 * torch.randn(p.shape, generator=gen))
        expert.save_pretrained(tmp_path / f"e{seed}")
        tuned.append(expert)
        paths[f"e{seed}"] = tmp_path / f"e{seed}"
    config_file = tmp_path / "base" / "config.json"
    stated = json.loads(config_file.read_text())
    del stated["vision_config"]["model_type"], stated["text_config"]["model_type"]  # which older files lack
    config_file.write_text(json.dumps(stated))
    mixture = build(tmp_path / "out", tmp_path / "base", paths, parameters=PARAMETERS)
    assert isinstance(mixture, tf.CLIPVisionModel)
    pixels = inputs("clip")["pixel_values"]
    layers = [n for n, m in start.named_modules() if isinstance(m, torch.nn.Linear)]
    experts = [from_model(start, t) for t in tuned]

    assert_matches(mixture, start, experts, layers, {"pixel_values": pixels}, **PARAMETERS)


def test_adapters_with_names_of_older_versions(tmp_path):
    """ViT's attention was `encoder.layer.N.attention.attention.query` when most adapters were trained."""
    base = base_model("vit")
    save(base, tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "new", 1, arch="vit", targets=["q_proj", "v_proj"])
    expert = from_adapter(base, adapter, ("classifier",))
    names = {"q_proj": "attention.query", "v_proj": "attention.value"}

    def old(tensors):
        renamed = {}
        for key, value in tensors.items():
            key = re.sub(r"vit\.layers\.", "vit.encoder.layer.", key)
            for new, was in names.items():
                key = key.replace(f"attention.{new}", f"attention.{was}")
            renamed[key] = value
        return renamed

    rewrite(adapter, old, "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["query", "value"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    mixture = build(tmp_path / "out", tmp_path / "base", {"old": adapter}, parameters=PARAMETERS)
    assert_matches(mixture, base, [expert], body_linears("vit", base), inputs("vit"), **PARAMETERS)


def test_sources_of_different_dtypes(tmp_path):
    """An expert saved in bfloat16 beside a float32 base: its delta is what its own numbers say."""
    base, tuned, paths = sources("bert", tmp_path)
    rounded = tuned["e1"].bfloat16()
    save(rounded, tmp_path / "half")
    tuned["e1"] = rounded.float()
    paths["e1"] = tmp_path / "half"
    check(build(tmp_path / "out", tmp_path / "base", paths, parameters=PARAMETERS), "bert", base, tuned)


@pytest.mark.parametrize("arch", ["bert", "gpt2", "mixtral"])
def test_the_light_form_is_the_same_mixture(arch, tmp_path):
    _, _, paths = sources(arch, tmp_path)
    recipe = {
        "method": "smile",
        "base": str(tmp_path / "base"),
        "experts": {n: str(p) for n, p in paths.items()},
        "parameters": PARAMETERS,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        coterie.build(recipe, out=tmp_path / "whole")
        coterie.build(recipe, out=tmp_path / "light", light=True)
        whole, light = coterie.load(tmp_path / "whole").eval(), coterie.load(tmp_path / "light").eval()
    assert torch.equal(outputs(light, inputs(arch)), outputs(whole, inputs(arch)))
    size = {n: sum(f.stat().st_size for f in (tmp_path / n).glob("*.safetensors")) for n in ("whole", "light", "base")}
    assert size["light"] < size["whole"] - 0.9 * size["base"]
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, light.state_dict()[name]), name
    light.save_pretrained(tmp_path / "again")  # a light mixture saves as a whole one
    assert torch.equal(outputs(coterie.load(tmp_path / "again").eval(), inputs(arch)), outputs(whole, inputs(arch)))
    with pytest.raises(Exception, match=r"coterie\.load"):
        getattr(tf, ARCHS[arch].auto).from_pretrained(tmp_path / "light")
    save(base_model(arch, seed=9), tmp_path / "other")
    with pytest.raises(CoterieError):
        coterie.load(tmp_path / "light", base=str(tmp_path / "other"))


def test_a_light_mixture_whose_base_has_changed_is_refused(tmp_path):
    _, _, paths = sources("bert", tmp_path)
    recipe = {"method": "smile", "base": str(tmp_path / "base"), "experts": {"a": str(paths["e1"])}}
    coterie.build(recipe, out=tmp_path / "light", light=True)
    coterie.load(tmp_path / "light")

    def nudge(tensors):
        name = "bert.embeddings.word_embeddings.weight"
        return {**tensors, name: tensors[name] + 0.01}

    rewrite(tmp_path / "base", nudge)
    with pytest.raises(CoterieError):
        coterie.load(tmp_path / "light")


@pytest.mark.parametrize("arch", ["bert", "gpt2", "vit"])
def test_an_expert_comes_back(arch, tmp_path):
    _, tuned, paths = sources(arch, tmp_path)
    build(tmp_path / "out", tmp_path / "base", paths, parameters={"rank": "full", "gate_rank": 4}, load=False)
    for name, model in tuned.items():
        coterie.extract_expert(tmp_path / "out", name, tmp_path / f"back-{name}")
        back = getattr(tf, ARCHS[arch].auto).from_pretrained(tmp_path / f"back-{name}").eval()
        assert not hasattr(back, "coterie")
        assert relative_error(outputs(back, inputs(arch)), outputs(model, inputs(arch))) <= 1e-5
        plain = load_file(tmp_path / name / "model.safetensors")
        assert set(load_file(tmp_path / f"back-{name}" / "model.safetensors")) == set(plain)


def test_quantised_bases_are_refused(tmp_path):
    _, _, paths = sources("llama", tmp_path)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CoterieError, match="quanti"):
        build(tmp_path / "out", tmp_path / "base", paths)
    assert not (tmp_path / "out").exists()


def test_a_mixture_is_no_source(tmp_path):
    """A mixture as base or as expert is refused, or else it counts as all that it is: never as its base."""
    base, tuned, paths = sources("bert", tmp_path)
    mixture = build(tmp_path / "mix", tmp_path / "base", paths, parameters=PARAMETERS)
    with pytest.raises(CoterieError, match="mixture"):
        build(tmp_path / "out", tmp_path / "mix", paths, parameters=PARAMETERS)
    with pytest.raises(CoterieError, match="mixture"):
        build(tmp_path / "out", tmp_path / "base", {"m": tmp_path / "mix", **paths}, parameters=PARAMETERS)
    with pytest.raises(CoterieError, match="mixture"):
        coterie.smile(mixture, tuned)
    with pytest.raises(CoterieError, match="mixture"):
        coterie.smile(base, {"m": mixture, **tuned})


def _tokenizer(path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz", *(f"w{i}" for i in range(70))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )
    fast.save_pretrained(path)
    return fast


def test_pipelines(tmp_path):
    """The base's tokenizer comes along, and a pipeline runs from the directory and answers with the head's labels."""
    base, _, _ = sources("bert", tmp_path)
    _tokenizer(tmp_path / "base")
    paths = {}
    for seed, labels in {1: ["bad", "good", "so-so"], 2: ["sport", "news", "art"]}.items():
        expert = fine_tune(base, seed)
        expert.config.id2label = dict(enumerate(labels))
        expert.config.label2id = {v: k for k, v in enumerate(labels)}
        paths[labels[0]] = save(expert, tmp_path / labels[0])
    mixture = build(tmp_path / "out", tmp_path / "base", paths, parameters=PARAMETERS)
    pipe = tf.pipeline("text-classification", model=str(tmp_path / "out"))
    assert pipe("a b c")[0]["label"] in ("bad", "good", "so-so")
    with pipe.model.coterie.use_head("sport"):
        assert pipe("a b c")[0]["label"] in ("sport", "news", "art")
    tokens = tf.AutoTokenizer.from_pretrained(tmp_path / "out")(
        ["a b", "w1 w2 w3 w4"], padding=True, return_tensors="pt"
    )
    tokens.pop("token_type_ids", None)
    alone = tf.AutoTokenizer.from_pretrained(tmp_path / "base")(["a b"], return_tensors="pt")
    alone.pop("token_type_ids", None)
    assert relative_error(outputs(mixture, tokens)[:1], outputs(mixture, alone)) <= 1e-5

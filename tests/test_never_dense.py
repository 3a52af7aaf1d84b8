"""No route from a mixture directory silently yields the base model: it is the mixture, or it is an error."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import coterie
from matching import build, python, relative_error
from zoo import base_model, fine_tune, inputs, save

# Each route is an expression over `path`, the mixture's directory, and `base`, the base model's.
WEIGHTS = {
    "bert": [
        "tf.AutoModelForSequenceClassification.from_pretrained(path)",
        "tf.AutoModel.from_pretrained(path)",
        "tf.BertForSequenceClassification.from_pretrained(path)",
        "tf.BertModel.from_pretrained(path)",
        "tf.BertForSequenceClassification.from_pretrained(path, attn_implementation='eager')",
        "tf.BertModel.from_pretrained(path, attn_implementation='eager')",
        "tf.AutoModel.from_pretrained(path, dtype='float32', device_map='cpu')",
        "tf.BertModel.from_pretrained(path, config=tf.AutoConfig.from_pretrained(path))",
        "tf.BertModel.from_pretrained(path, quantization_config=None)",
        "tf.pipeline('text-classification', model=str(path), tokenizer=None).model",
    ],
    "clip": [
        "tf.AutoModel.from_pretrained(path)",
        "tf.CLIPModel.from_pretrained(path)",
        "tf.CLIPModel.from_pretrained(path, attn_implementation='eager')",
        "tf.CLIPVisionModel.from_pretrained(path)",
        "tf.CLIPVisionModel.from_pretrained(path, attn_implementation='eager')",
        "tf.CLIPTextModel.from_pretrained(path)",
        "tf.CLIPTextModel.from_pretrained(path, attn_implementation='eager')",
        "tf.CLIPVisionModelWithProjection.from_pretrained(path)",
        "tf.CLIPTextModelWithProjection.from_pretrained(path)",
        "tf.CLIPForImageClassification.from_pretrained(path)",
        "tf.CLIPVisionModel.from_pretrained(path, config=tf.AutoConfig.from_pretrained(path).vision_config)",
        "tf.CLIPVisionModel.from_pretrained(path, dtype=torch.float32, device_map='cpu')",
    ],
}
CONFIGS = {
    "bert": [
        "tf.AutoModelForSequenceClassification.from_config(tf.AutoConfig.from_pretrained(path))",
        "tf.AutoModel.from_config(tf.AutoConfig.from_pretrained(path))",
        "tf.AutoModel.from_config(tf.BertConfig.from_pretrained(path))",
        "tf.AutoModel.from_config(tf.AutoConfig.from_pretrained(path), attn_implementation='eager')",
        "tf.BertForSequenceClassification(tf.AutoConfig.from_pretrained(path))",
        "tf.BertModel(tf.AutoConfig.from_pretrained(path))",
    ],
    "clip": [
        "tf.AutoModel.from_config(tf.AutoConfig.from_pretrained(path))",
        "tf.CLIPModel(tf.AutoConfig.from_pretrained(path))",
        "tf.CLIPVisionModel(tf.CLIPVisionConfig.from_pretrained(path))",
        "tf.CLIPVisionModel(tf.AutoConfig.from_pretrained(path).vision_config)",
        "tf.CLIPTextModel(tf.CLIPTextConfig.from_pretrained(path))",
    ],
}

# Every route in one interpreter, each in isolation: what came of it is written to a file.
TRIAL = """
import json, sys, warnings
import torch
{imports}
import transformers as tf
from safetensors.torch import load_file, save_file
path, base, routes, batch, answers = sys.argv[1:6]
routes = json.loads(open(routes).read())
batch = load_file(batch)
text = {{k: v for k, v in batch.items() if k in ("input_ids", "attention_mask")}}
image = {{k: v for k, v in batch.items() if k == "pixel_values"}}
told, results = {{}}, {{}}
for i, route in enumerate(routes):
    try:
        model = eval(route).eval()
    except Exception as error:
        told[str(i)] = f"{{type(error).__name__}}: {{error}}"
        continue
    results[f"{{i}}.parameters"] = torch.tensor(float(sum(p.numel() for p in model.parameters())))
    name = type(model).__name__
    fed = image if "Vision" in name or "Image" in name else text if "Text" in name else batch
    with torch.no_grad():
        out = model(**fed, output_hidden_states=True)
    if getattr(out, "logits_per_image", None) is not None:
        results[f"{{i}}.vision"] = out.vision_model_output.last_hidden_state.clone()
        results[f"{{i}}.text"] = out.text_model_output.last_hidden_state.clone()
    else:
        results[f"{{i}}.{{'vision' if fed is image else 'text'}}"] = out.hidden_states[-1].clone()
results["count"] = torch.tensor(float(len(routes)))
save_file(results, answers)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """arch -> (mixture directory, base directory, a batch)."""
    made = {}
    for arch in WEIGHTS:
        root = tmp_path_factory.mktemp(arch)
        base = base_model(arch)
        save(base, root / "base")
        sources = {}
        for seed in (1, 2):
            sources[f"e{seed}"] = save(fine_tune(base, seed, scale=1.0), root / f"e{seed}")
        build(root / "out", root / "base", sources, parameters={"rank": 6, "gate_rank": 4}, load=False)
        made[arch] = root / "out", root / "base", inputs(arch)
    return made


def _hidden(model, arch, batch):
    """Last hidden states before any final norm's pooling, by tower."""
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    if arch == "clip":
        return {
            "vision": [out.vision_model_output.last_hidden_state, out.vision_model_output.hidden_states[-1]],
            "text": [out.text_model_output.last_hidden_state, out.text_model_output.hidden_states[-1]],
        }
    return {"text": [out.hidden_states[-1]]}


def _largest_dense(base, arch, route):
    """Parameters of the dense model that a configuration's route would build."""
    if arch == "bert":
        return sum(
            p.numel() for p in (base.bert if "AutoModel." in route or "BertModel(" in route else base).parameters()
        )
    part = base.vision_model if "Vision" in route else base.text_model if "Text" in route else base
    return sum(p.numel() for p in part.parameters())


@pytest.mark.parametrize("imports", ["", "import coterie"], ids=["without coterie", "with coterie"])
@pytest.mark.parametrize("arch", list(WEIGHTS))
def test_no_route_yields_the_base(imports, arch, directories, tmp_path):
    path, base_path, batch = directories[arch]
    routes = WEIGHTS[arch] + CONFIGS[arch]
    (tmp_path / "routes.json").write_text(json.dumps(routes))
    save_file(batch, tmp_path / "batch.safetensors")
    files = [tmp_path / n for n in ("routes.json", "batch.safetensors", "answers.safetensors")]
    told = json.loads(python(TRIAL.format(imports=imports), path, base_path, *files).splitlines()[-1])
    told = {routes[int(i)]: message[:150] for i, message in told.items()}
    results = load_file(files[-1])
    mixture, base = coterie.load(path).eval(), base_model(arch)
    ours, dense = _hidden(mixture, arch, batch), _hidden(base, arch, batch)
    wrong = []
    for i, route in enumerate(routes):
        if route in told:
            continue
        if route in CONFIGS[arch]:  # weights are random: a mixture has more of them than the dense model
            if results[f"{i}.parameters"] <= _largest_dense(base, arch, route):
                wrong.append(route)
            continue
        towers = {t: results[f"{i}.{t}"] for t in ("vision", "text") if f"{i}.{t}" in results}
        assert towers
        for tower, got in towers.items():
            assert min(relative_error(d, o) for d, o in zip(dense[tower], ours[tower], strict=True)) > 1e-2
            if min(relative_error(got, o) for o in ours[tower]) > 1e-4:
                near = min(relative_error(got, d) for d in dense[tower])
                wrong.append(f"{route} ({'the base' if near < 1e-4 else 'something else'})")
    assert not wrong, f"silently not the mixture: {wrong}; refused: {told}"
    plain = [r for r in WEIGHTS[arch] if ".from_pretrained(path" in r and "config" not in r and not _part(r, arch)]
    if imports:
        assert not set(plain) & set(told), "a plain route to the whole mixture was refused"


def _part(route, arch):
    """Does the route name a sub-model's class?"""
    whole = {
        "bert": ("AutoModelForSequenceClassification.", "BertForSequenceClassification."),
        "clip": ("AutoModel.", "CLIPModel."),
    }
    return not any(name in route for name in whole[arch])


def test_a_plain_configuration_over_a_mixture_is_not_the_base(directories):
    """Whoever loads the tensors with a configuration of their own gets no base model either."""
    import transformers

    path, base_path, batch = directories["bert"]
    base = base_model("bert")
    for cls in (transformers.BertModel, transformers.BertForSequenceClassification):
        try:
            model = cls.from_pretrained(path, config=transformers.AutoConfig.from_pretrained(base_path)).eval()
        except Exception:
            continue
        got, dense = _hidden(model, "bert", batch)["text"][0], _hidden(base, "bert", batch)["text"][0]
        assert relative_error(got, dense) > 1e-2


def test_a_quantised_load_is_refused(directories):
    """A user's own quantization_config cannot be combined with a mixture, and the answer says so."""
    import transformers

    path, _, _ = directories["bert"]
    quantisation = transformers.QuantoConfig(weights="int8") if hasattr(transformers, "QuantoConfig") else None
    if quantisation is None:
        quantisation = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(Exception) as caught:
        coterie.load(path, quantization_config=quantisation)
    assert "quanti" in str(caught.value).lower()

"""TALL masks and EMR: one model per task, against the papers' formulas in float64; named by `route`, kept as bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor, nn

import coterie
from coterie.building.in_memory import build_in_memory
from coterie.errors import CoterieError
from coterie.experts.masked import Masked, pack, unpack
from coterie.methods.registry import get
from coterie.mixture.layer import is_mixture
from coterie.sources.delta import Dense
from zoo import base_model, fine_tune, inputs, load_dense, make_adapter, outputs, save

TASKS = ("first", "second", "third")
METHODS = {"tall": {"threshold": 0.6}, "emr": {}}

# Deltas (experts, out, in) of small whole numbers: sums are exact; zeros, equal magnitudes and ties of signs abound.
stacks = arrays(
    np.float32, array_shapes(min_dims=3, max_dims=3, max_side=5), elements=st.integers(-4, 4).map(float)
).map(torch.from_numpy)


def sources(folder: Path, arch: str) -> tuple[nn.Module, list[nn.Module]]:
    base = base_model(arch)
    tuned = [fine_tune(base, seed, everything=True) for seed in range(len(TASKS))]
    save(base, folder / "base")
    for name, model in zip(TASKS, tuned, strict=True):
        save(model, folder / name)
    return base, tuned


def build(folder: Path, method: str, out: str = "mixture", **keys: Any) -> coterie.BuildReport:
    experts = {name: str(folder / name) for name in TASKS}
    recipe = {"method": method, "base": str(folder / "base"), "experts": experts, "parameters": METHODS[method]}
    return coterie.build({**recipe, "others": "per_expert", **keys.pop("recipe", {})}, out=folder / out, **keys)


def by_formula(method: str, base: dict[str, Tensor], models: list[dict[str, Tensor]], masked: set[str]) -> list[Any]:
    """Each task's tensors, straight from the papers."""
    tau = [{n: m[n].double() - base[n].double() for n in masked} for m in models]
    total = {n: sum(t[n] for t in tau) for n in masked}
    if method == "tall":  # equation 5, lambda = 0.6
        masks = [{n: t[n].abs() > 0.6 * (total[n] - t[n]).abs() for n in masked} for t in tau]
        return [{n: base[n] + mask[n] * total[n] for n in masked} for mask in masks]
    unified = {}
    for n in masked:
        gamma = total[n].sign()
        agreeing = torch.stack([t[n].abs() * (t[n].sign() == gamma) for t in tau])
        unified[n] = gamma * agreeing.max(0).values
    found = []
    for t in tau:
        kept = {n: (t[n] * unified[n] > 0) * unified[n] for n in masked}
        scale = sum(float(t[n].abs().sum()) for n in masked) / (sum(float(kept[n].abs().sum()) for n in masked) or 1.0)
        found.append({n: base[n] + scale * kept[n] for n in masked})
    return found


def masked_names(model: nn.Module) -> dict[str, Any]:
    return {path: layer for path, layer in model.named_modules() if is_mixture(layer)}


@pytest.mark.parametrize("arch", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_papers_formula(tmp_path: Path, method: str, arch: str) -> None:
    base, tuned = sources(tmp_path, arch)
    # gpt2 and llama hold bare or tied tensors that cannot be kept per expert
    report = build(tmp_path, method, recipe={"others": "per_expert" if arch == "llama" else "base"})
    model = coterie.load(str(tmp_path / "mixture"))
    layers = masked_names(model)
    names = {
        f"{p}.{leaf}" for p, layer in layers.items() for leaf in ("weight", "bias") if getattr(layer, leaf) is not None
    }
    states = [m.state_dict() for m in (base, *tuned)]
    want = by_formula(method, states[0], states[1:], names)
    for i, task in enumerate(TASKS):
        dense = load_dense(tmp_path / "base", arch)
        dense.load_state_dict({**dense.state_dict(), **(states[1 + i] if arch == "llama" else {}), **want[i]})
        for path in () if arch != "bert" else ("classifier",):
            dense.get_submodule(path).load_state_dict(tuned[i].get_submodule(path).state_dict())
        if arch == "llama" or arch == "bert":
            model.coterie.use_head(task)
        with model.coterie.route(task):
            torch.testing.assert_close(outputs(model, inputs(arch)), outputs(dense, inputs(arch)), rtol=1e-4, atol=1e-5)
        weights = tuple(float(j == i) for j in range(len(TASKS)))
        for path, layer in layers.items():
            weight, bias = layer.merge(weights)
            weight = weight.T if arch == "gpt2" else weight
            torch.testing.assert_close(weight.double(), want[i][f"{path}.weight"], rtol=1e-5, atol=1e-6)
            if bias is not None:
                torch.testing.assert_close(bias.double(), want[i][f"{path}.bias"], rtol=1e-5, atol=1e-6)
            given = next(each for each in report.layers if each.path == path)
            tau, kept = (
                torch.cat([(s[n].double() - states[0][n]).flatten() for n in names if n.rpartition(".")[0] == path])
                for s in (states[1 + i], want[i])
            )
            assert given.residuals[i] == pytest.approx(float((tau - kept).norm() / tau.norm()), rel=1e-4)


def each_experts(method: str, deltas: Tensor) -> Tensor:
    """What a mixture of one layer adds to it for each expert, (E, out, in), from their deltas of that shape."""
    masked = get(method).assemble(**METHODS[method]).fitted
    assert isinstance(masked, Masked)
    experts, d_out, d_in = deltas.shape
    given: list[Any] = [Dense(delta) for delta in deltas]
    fitted = masked.fit("layer", torch.zeros(d_out, d_in), given, [None] * experts, [1.0] * experts)
    assert fitted is not None
    shapes = masked.finish({"layer": fitted.shape}, {"layer": fitted.sums}, {"layer": fitted.report})
    bank = shapes["layer"].bank(d_in, d_out)
    bank.load_state_dict(fitted.tensors)
    with torch.no_grad():
        return torch.stack([bank.delta(row)[0] for row in torch.eye(experts).tolist()])


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=50)
@given(stacks, st.randoms(use_true_random=False), st.sampled_from([4.0, 0.25, -1.0]))
def test_properties(method: str, deltas: Tensor, random: Any, factor: float) -> None:
    found = each_experts(method, deltas)
    want = by_formula(method, {"w": torch.zeros(deltas.shape[1:])}, [{"w": delta} for delta in deltas], {"w"})
    torch.testing.assert_close(found.double(), torch.stack([task["w"] for task in want]), rtol=1e-6, atol=1e-6)
    order = random.sample(range(len(deltas)), len(deltas))
    assert each_experts(method, deltas[order]).equal(found[order])
    assert each_experts(method, factor * deltas).equal(factor * found)
    one = deltas[:1]
    assert each_experts(method, one).equal(one)
    assert each_experts(method, torch.zeros_like(deltas)).equal(torch.zeros_like(deltas))
    beside_zero = each_experts(method, torch.cat([torch.zeros_like(one), deltas]))
    assert beside_zero.equal(torch.cat([torch.zeros_like(one), found]))
    # Identical experts are elected as they are; added up, they stay where |delta| > 0.6 (E - 1) |delta|.
    for experts in (2, 3):
        copies = one.expand(experts, -1, -1)
        kept = 1 if method == "emr" else experts * (0.6 * (experts - 1) < 1)
        assert each_experts(method, copies).equal(kept * copies)


@given(st.integers(1, 5), st.integers(1, 20), st.integers(0, 2**20))
def test_a_bit_an_element(rows: int, columns: int, seed: int) -> None:
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(mask)
    assert packed.dtype == torch.uint8 and len(packed) == -(-rows * columns // 8)
    assert torch.equal(unpack(packed, mask.shape), mask)
    assert int(packed[0]) == sum(int(bit) << i for i, bit in enumerate(mask.flatten()[:8]))


@pytest.mark.parametrize("method", METHODS)
def test_without_a_name_it_is_one_clear_error(tmp_path: Path, method: str) -> None:
    sources(tmp_path, "bert")
    build(tmp_path, method)
    model = coterie.load(str(tmp_path / "mixture"))
    batch = inputs("bert")
    for before in (
        lambda: None,
        lambda: model.coterie.route(["first", "second"]),
        lambda: model.coterie.use_path("stacked"),
    ):
        model.coterie.route(None)
        before()
        with pytest.raises(CoterieError, match=r"one model per task.*route"):
            model(**batch)
    model.coterie.route("second")
    found = [outputs(model, batch)]
    for path in ("grouped", "merged", "auto"):
        with model.coterie.use_path(path):
            found.append(outputs(model, batch))
    assert all(torch.equal(found[0], other) for other in found)
    with coterie.routing_trace(model) as trace:
        model(**batch)
    assert all(torch.equal(gates[..., 1], torch.ones_like(gates[..., 1])) for gates in trace.values()) and trace


def test_an_expert_that_leaves_a_layer_alone_has_the_bases_there() -> None:
    base = base_model("bert")
    both = fine_tune(base, 0, heads=False)
    few = fine_tune(base, 1, modules=["query"], heads=False)
    mixture = build_in_memory("emr", base, {"both": both, "few": few})
    with mixture.coterie.route("few"), torch.no_grad():
        x = torch.randn(3, 32)
        layer, same = (m.get_submodule("bert.encoder.layer.0.output.dense") for m in (mixture, base))
        wide = torch.randn(3, 64)
        torch.testing.assert_close(layer(wide), same(wide))
        query, same = (m.get_submodule("bert.encoder.layer.0.attention.self.query") for m in (mixture, base))
        assert not torch.allclose(query(x), same(x))
    mixture.coterie.route(None)
    with pytest.raises(CoterieError, match="one model per task"):  # though that layer has one candidate
        layer(wide)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_small_and_survives_saving(tmp_path: Path, method: str) -> None:
    sources(tmp_path, "bert")
    build(tmp_path, method)
    model = coterie.load(str(tmp_path / "mixture"))
    layer = model.get_submodule("bert.encoder.layer.0.output.dense")
    sizes = {name: (tensor.dtype, tensor.numel()) for name, tensor in layer.bank.state_dict().items()}
    assert sizes == {
        "shared": (torch.float32, 2048), "masks": (torch.uint8, 3 * 256), "bias": (torch.float32, 32),
        "bias_masks": (torch.uint8, 12),
    }  # fmt: skip
    model.save_pretrained(tmp_path / "again")
    again = coterie.load(str(tmp_path / "again"))
    half = coterie.load(str(tmp_path / "again"), dtype=torch.bfloat16)
    assert half.get_submodule("bert.encoder.layer.0.output.dense").bank.masks.dtype == torch.uint8
    for name in TASKS:
        for each in (model, again, half):
            each.coterie.route(name), each.coterie.use_head(name)
        want = outputs(model, inputs("bert"))
        assert torch.equal(outputs(again, inputs("bert")), want)
        torch.testing.assert_close(outputs(half, inputs("bert")).float(), want, rtol=0.1, atol=0.1)
        coterie.extract_expert(tmp_path / "mixture", name, tmp_path / f"only {name}")
        dense = load_dense(tmp_path / f"only {name}", "bert")
        torch.testing.assert_close(outputs(dense, inputs("bert")), want, rtol=1e-5, atol=1e-6)
    plain = json.loads((tmp_path / "mixture" / "config.json").read_text())["quantization_config"]["layers"]
    assert all(("scales" in shape) and len(shape["scales"]) == 3 for shape in plain.values())
    with pytest.raises(ValueError, match="coterie"):
        from transformers import BertForSequenceClassification

        config = BertForSequenceClassification.config_class.from_pretrained(tmp_path / "mixture")
        BertForSequenceClassification(config)


def test_the_same_bytes_every_way(tmp_path: Path) -> None:
    sources(tmp_path, "bert")
    for out, keys in (("one", {"jobs": 1}), ("three", {"jobs": 3})):
        build(tmp_path, "emr", out, **keys)
    one, three = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("one", "three"))
    assert one == three
    build(tmp_path, "emr", "light", light=True)
    whole, light = (coterie.load(str(tmp_path / out)) for out in ("one", "light"))
    for model in (whole, light):
        model.coterie.route("third")
    assert torch.equal(outputs(whole, inputs("bert")), outputs(light, inputs("bert")))


def test_adapters_weights_and_mixes(tmp_path: Path) -> None:
    base, tuned = sources(tmp_path, "bert")
    make_adapter(tmp_path / "base", tmp_path / "adapter", 5, arch="bert")
    experts = {"first": {"source": str(tmp_path / "first"), "weight": 2.0}, "adapter": str(tmp_path / "adapter")}
    build(tmp_path, "tall", recipe={"experts": experts, "others": "base"})
    model = coterie.load(str(tmp_path / "mixture"))
    layer = model.get_submodule("bert.encoder.layer.0.attention.self.query")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    import peft

    merged = peft.PeftModel.from_pretrained(load_dense(tmp_path / "base", "bert"), str(tmp_path / "adapter"))
    w = base.state_dict()[name].double()
    taus = [2 * (tuned[0].state_dict()[name] - w), merged.merge_and_unload().state_dict()[name] - w]
    want = [((t.abs() > 0.6 * (sum(taus) - t).abs()) * sum(taus)) for t in taus]
    torch.testing.assert_close(
        layer.merge((0.25, 0.5))[0].double(), w + 0.25 * want[0] + 0.5 * want[1], rtol=0, atol=1e-5
    )
    with model.coterie.route({"first": 0.25, "adapter": 0.5}):
        x = torch.randn(2, 32)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, *layer.merge((0.25, 0.5))))


def test_training_reaches_the_shared_delta() -> None:
    base = base_model("bert")
    experts = {name: fine_tune(base, seed) for seed, name in enumerate(TASKS)}
    mixture = build_in_memory("emr", base, experts)
    mixture.coterie.route("first")
    mixture(**inputs("bert")).logits.sum().backward()
    bank = mixture.get_submodule("bert.encoder.layer.0.output.dense").bank
    outside = ~unpack(bank.masks[0], bank.shared.shape)
    assert bank.shared.grad.abs().sum() > 0 and bank.shared.grad[outside].abs().sum() == 0


def test_bad_parameters(tmp_path: Path) -> None:
    sources(tmp_path, "bert")
    for method, parameters, said in (("tall", {"threshold": 0}, "threshold is 0"), ("emr", {"rank": 3}, "rank")):
        with pytest.raises(CoterieError, match=said):
            build(tmp_path, method, recipe={"parameters": parameters})
    with pytest.raises(CoterieError, match="base"):
        coterie.build(method="emr", base=tmp_path / "base", experts={"same": tmp_path / "base"}, out=tmp_path / "x")
    plan = coterie.plan(
        method="emr", base=tmp_path / "base", experts={name: tmp_path / name for name in TASKS}, others="per_expert"
    )
    build(tmp_path, "emr", light=False)
    written = sum(f.stat().st_size for f in (tmp_path / "mixture").glob("*.safetensors"))
    assert plan.bytes_written_low < written and plan.layers[0].ranks == ["mask"] * 3
    table = coterie.plan  # the tables can be drawn
    from rich.console import Console

    from coterie.report.inspect import inspect

    console = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(plan.table(), inspect(str(tmp_path / "mixture")).table())
    assert "mask" in console.export_text() and table

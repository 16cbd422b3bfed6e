"""Parameter groups, the learning rate, and averaged weights."""

import json
import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from sievit.config import from_json, to_json
from sievit.engine.optim import (
    Average,
    build_optimizer,
    freeze,
    learning_rate,
    parameter_groups,
    set_learning_rate,
)
from sievit.engine.recipe import Frozen, TrainConfig
from sievit.heads.setr import SETRNaiveConfig
from sievit.models.base import Model
from sievit.models.build import build
from sievit.necks.adapter import AdapterConfig
from sievit.policies import SpreadConfig, SViTConfig
from sievit.recipes import recipe
from tiny import on_meta, refused, tiny_detector, tiny_segmenter, tiny_vit

CONFIG = TrainConfig(epochs=10, batch_size=4, lr=1e-3, weight_decay=0.05, warmup_steps=0, policy_lr=3.0)


def of_each(model: nn.Module, config: TrainConfig, what: str) -> dict[str, float]:
    """A setting of the group of every parameter, of which each is in one."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = [(names[id(p)], group[what]) for group in parameter_groups(model, config) for p in group["params"]]
    assert sorted(name for name, _ in pairs) == sorted(names.values())
    return dict(pairs)


def test_every_parameter_is_in_one_group_and_norms_biases_and_positions_are_not_decayed():
    model = build(recipe("nuclei_svit").model)
    decays = of_each(model, CONFIG, "weight_decay")
    assert set(decays.values()) == {0.0, 0.05}
    decayed = {name for name, decay in decays.items() if decay}
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):  # of the injectors: the papers' groups name norms, biases and positions alone
            assert name in decayed
        elif parameter.ndim == 1 or ("embed" in name and "patch_embed" not in name):
            assert name not in decayed, name
        else:
            assert name in decayed, name
    assert {"backbone.level_embed", "backbone.vit.pos_embed"}.isdisjoint(decayed)
    assert {"backbone.vit.patch_embed.proj.weight", "backbone.policy.gates.0.fc1.weight"} <= decayed


def test_registers_and_layer_scales_are_not_decayed():
    config = recipe("coco_dinov3_s_svit").model
    model = on_meta(config)
    decayed = {
        name for name, decay in of_each(model, replace(CONFIG, layer_decay=0.8), "weight_decay").items() if decay
    }
    scales = of_each(model, replace(CONFIG, layer_decay=0.8), "lr_scale")
    of_vit = {name.removeprefix("backbone.vit.") for name in decayed if name.startswith("backbone.vit.")}
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert of_vit == {"patch_embed.proj.weight", *(f"blocks.{i}.{name}.weight" for i in range(12) for name in layers)}
    assert scales["backbone.vit.reg_token"] == scales["backbone.vit.cls_token"] == pytest.approx(0.8**13)
    assert scales["backbone.vit.blocks.11.ls1.gamma"] == pytest.approx(0.8)


def test_the_policy_has_its_own_rate():
    model = build(recipe("nuclei_svit").model)
    optimizer = build_optimizer(model, CONFIG)
    set_learning_rate(optimizer, 0.5)
    gates = {id(parameter) for parameter in model.policy.parameters()}
    assert gates
    for group in optimizer.param_groups:
        of_policy = {id(p) in gates for p in group["params"]}
        assert len(of_policy) == 1
        assert group["lr"] == (1.5 if of_policy.pop() else 0.5)


def test_frozen_parameters_are_left_out():
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    assert [p.shape for group in parameter_groups(layer, CONFIG) for p in group["params"]] == [(2, 2)]


def test_rates_fall_from_block_to_block_towards_the_embedding():
    model = build(recipe("nuclei_svit").model)
    config = replace(CONFIG, layer_decay=0.5, head_lr=7.0)
    groups, scales = parameter_groups(model, config), of_each(model, config, "lr_scale")
    for name, scale in scales.items():
        if name.startswith("backbone.vit.blocks."):
            expected = 0.5 ** (12 - int(name.split(".")[3]))
        elif name.startswith("backbone.vit."):
            expected = 0.5**13
        else:
            expected = 3.0 if "policy." in name else 7.0 if name.startswith("head.") else 1.0
        assert scale == pytest.approx(expected), name
    some = ("vit.patch_embed.proj.weight", "vit.blocks.0.attn.qkv.weight", "vit.blocks.11.mlp.fc2.bias")
    assert [scales[f"backbone.{name}"] for name in some] == pytest.approx([0.5**13, 0.5**12, 0.5])
    decays = [(g["lr_scale"], g["weight_decay"]) for g in groups]
    assert len(decays) == len(set(decays)), "one group of each kind"


def test_the_norm_behind_the_blocks_has_the_full_rate():
    config = recipe("folders_segvit_s").model
    model = build(replace(config, vit=replace(config.vit, depth=12, embed_dim=12, num_heads=2, final_norm=True)))
    scales = of_each(model, replace(CONFIG, layer_decay=0.5), "lr_scale")
    assert {scales[f"net.vit.norm.{name}"] for name in ("weight", "bias")} == {1.0}


def test_what_is_frozen_has_neither_gradients_nor_drop_path():
    config = recipe("nuclei_svit").model
    config = replace(config, vit=replace(config.vit, drop_path_rate=0.3))

    def left(what: Frozen) -> tuple[set[str], list[float]]:
        model = build(config)
        freeze(model, what)
        vit = model.vit
        return {n for n, p in vit.named_parameters() if p.requires_grad}, [
            vars(block)["drop_path"] for block in vit.blocks
        ]

    everything, rates = left("none")
    assert (len(everything), rates[-1]) == (len(list(build(config).vit.parameters())), pytest.approx(0.3))
    assert left("vit") == (set(), [0.0] * 12)
    names, some = left(4)
    assert names == {n for n in everything if n.startswith("blocks.") and int(n.split(".")[1]) >= 4}
    assert some == [0.0] * 4 + rates[4:]
    assert left(12)[0] == set()
    refused("freeze is 13, but the ViT has 12 blocks", left, 13)
    assert left("model") == (set(), [0.0] * 12)


@pytest.mark.parametrize("task", ["detector", "segmenter"])
def test_a_frozen_model_draws_nothing_and_keeps_its_statistics(task: str):
    """So that gates learn in the model that they are used in: no drop path, no dropout, no norms of a batch."""
    vit = tiny_vit(depth=3, drop_path_rate=0.5)
    policy = SViTConfig(first_block=1, targets=(0.7, 0.5))
    if task == "detector":
        neck = AdapterConfig(conv_inplane=4, deform_num_heads=2, num_interactions=3, drop_path_rate=0.5)
        model: Model = build(tiny_detector(vit=vit, neck=neck, policy=policy))
    else:
        head = SETRNaiveConfig(channels=8, dropout=0.5)
        model = build(tiny_segmenter(vit=vit, head=head, policy=policy, out_indices=(0, 2)))
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    before = {name: value.clone() for name, value in model.named_buffers()}
    assert any("running_mean" in name for name in before)
    image = torch.rand(2, 3, 64, 64)

    def maps() -> Tensor:
        model.train()
        model.policy.eval()
        out, _ = model.network(image)
        return torch.cat([one.flatten() for one in (out.values() if isinstance(out, dict) else [out])])

    assert not torch.equal(maps(), maps())
    freeze(model, "model")
    for name, value in before.items():
        model.get_buffer(name).copy_(value)
    first = maps()
    assert torch.equal(first, maps())
    for name, value in before.items():
        assert torch.equal(model.get_buffer(name), value), name
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".policy." in n
    }


def test_a_policy_without_weights_cannot_be_trained_alone():
    refused(
        "a policy of Spread has no weights", freeze, build(tiny_detector(policy=SpreadConfig(shares=(0.5,)))), "model"
    )


@pytest.mark.parametrize("value", ["none", "vit", "model", 3])
def test_what_is_frozen_survives_json(value: Frozen):
    config = replace(CONFIG, freeze=value)
    assert from_json(TrainConfig, json.loads(json.dumps(to_json(config)))) == config
    refused("freeze", from_json, TrainConfig, {"freeze": "blocks"})


@pytest.mark.parametrize(
    ("schedule", "step", "factor"),
    [
        ("constant", 99, 1.0),
        ("step", 69, 1.0),
        ("step", 70, 0.1),
        ("step", 90, 0.01),
        ("cosine", 0, 1.0),
        ("cosine", 50, 0.5),
        ("cosine", 99, (1 + math.cos(0.99 * math.pi)) / 2),
        ("poly", 50, (1 - 50 / 99) ** 0.9),
        ("poly", 0, 1.0),
    ],
)
def test_schedules(schedule: Literal["constant", "step", "cosine", "poly"], step: int, factor: float):
    config = replace(CONFIG, schedule=schedule, step_epochs=(7, 9))
    assert learning_rate(config, step, 10) == pytest.approx(1e-3 * factor)


def test_warm_up_is_that_of_mmcv():
    """From `warmup_start` times the rate, linear in the step (warmup_ratio 0.001, warmup_iters 500 in the papers)."""
    config = replace(CONFIG, schedule="constant", warmup_steps=500, warmup_start=0.001)
    for step in (0, 1, 250, 499, 500, 501):
        k = (1 - min(step, 500) / 500) * (1 - 0.001)
        assert learning_rate(config, step, 1000) == pytest.approx(1e-3 * (1 - k))


def test_the_average_follows_and_forgets_early_weights():
    linear, norm = nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)
    model = nn.Sequential(linear, norm)
    nn.init.constant_(linear.weight, 0.0)
    average, expected = Average(model, 0.25), 0.0
    for t, value in enumerate((1.0, 2.0, 3.0, 4.0), start=1):
        nn.init.constant_(linear.weight, value)
        norm.get_buffer("num_batches_tracked").add_(1)
        average.update(model)
        decay = min(0.25, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * value
    assert float(average.values["0.weight"]) == pytest.approx(expected)
    assert int(average.values["1.num_batches_tracked"]) == 4
    copy = Average(model, 0.25)
    copy.load_state_dict(average.state_dict())
    assert copy.updates == 4
    assert torch.equal(copy.values["0.weight"], average.values["0.weight"])

"""Parity with the released DToP, with its SETR-like heads and those of mmsegmentation, from recorded data."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sievit.convert import segvit_segmenter
from sievit.convert.dtop import ATM_RULES, VIT_RULES, numbered_heads
from sievit.convert.keys import Rules, load_strictly, rename
from sievit.heads import ATM, ATMConfig, MLPConfig, SemanticHead, SETRNaive, SETRNaiveConfig, build_head
from sievit.heads.semantic import resize
from sievit.losses import ATMLossConfig, atm_loss, pixel_loss
from sievit.measure.published import published_macs
from sievit.models.inputs import InputConfig
from sievit.models.segmenter import SegmentationNet, Segmenter, SegmenterConfig
from sievit.policies import DToPConfig, KeepAllConfig
from sievit.policies.dtop import DToP
from sievit.tokens import Tokens, Trace
from sievit.vit import Execution, ViT, ViTConfig
from sievit.vit.execution import Mode
from tiny import assert_gradient, released_names, without_dropout

MODEL: dict[str, Any] = {"num_heads": 4, "head_num_heads": 2, "out_indices": (1, 3, 5)}
CASES = ["dense", "common_lo", "common_mid", "common_hi", "perstage", "perstage_dec", "stage1_only", "mixed"]
CANVAS, PRED = 5e-5, 1e-5
TERMS = {"loss_ce": "class", "loss_mask": "mask", "loss_dice": "dice"}


@pytest.fixture(scope="module")
def weights(golden_dtop: Path) -> dict[str, Tensor]:
    return load_file(golden_dtop / "small_A_state.safetensors")


def recorded(path: Path) -> tuple[dict[str, Tensor], tuple[float, ...]]:
    """The tensors of a case, and its thresholds."""
    with safe_open(path, framework="pt") as file:
        thresholds = json.loads(file.metadata()["thresh"].replace("(", "[").replace(")", "]"))
    return load_file(path), tuple(thresholds)


def check_stages(net: SegmentationNet, images: Tensor, case: dict[str, Tensor], mode: Mode = "auto") -> None:
    """Who left at each stage, and what each head said."""
    with torch.inference_mode():
        net.policy.train()  # heads at threshold 1 change nothing and are not asked but in training
        said, trace = net.predictions(images, execution=Execution(mode=mode))
    assert list(said) == [1, 3, 5] and len(trace.exited) == 3
    for stage, (prediction, exited) in enumerate(zip(said.values(), trace.exited, strict=True)):
        assert torch.equal(exited, case[f"stage{stage}.mask_out"]), stage
        maps, classes = case[f"stage{stage}.canvas_out"], case[f"stage{stage}.pred_logits"]
        torch.testing.assert_close(prediction.maps, maps, atol=CANVAS, rtol=0)
        assert prediction.classes is not None
        torch.testing.assert_close(prediction.classes, classes, atol=1e-4, rtol=0)
        torch.testing.assert_close(prediction.scores(), case[f"stage{stage}.pred"], atol=PRED, rtol=0)
        left = ~case[f"stage{stage}.mask_in"]
        assert torch.equal(trace.keep[net.out_indices[stage]], left)


def check_tokens(net: SegmentationNet, images: Tensor, case: dict[str, Tensor]) -> None:
    """The features of the tokens that each block computed."""
    with torch.inference_mode():
        tokens = net.vit.embed(images)
        torch.testing.assert_close(tokens.x, case["tokens.in"][:, 1:], atol=1e-5, rtol=0)
        trace = Trace.start(tokens)
        for block in range(6):
            tokens, trace = net.vit.run_blocks(tokens, net.policy, trace, start=block, stop=block + 1)
            expected, part = case[f"tokens.layer{block}"], trace.keep[block]
            assert not expected[~part].any(), "the release holds zeros where tokens have left"
            torch.testing.assert_close(tokens.patches[part], expected[part], atol=2e-5, rtol=0)


@pytest.mark.parametrize("mode", ["packed", "padded", "masked"])
@pytest.mark.parametrize("batch", ["b1", "b3"])
@pytest.mark.parametrize("name", CASES)
def test_evaluation_equals_the_release(golden_dtop: Path, weights, name: str, batch: str, mode: Mode) -> None:
    case, thresholds = recorded(golden_dtop / f"eval_A_{name}_{batch}.safetensors")
    images = load_file(golden_dtop / "eval_A_input.safetensors")["input"][: int(batch[1])]
    net = segvit_segmenter(weights, **MODEL, policy=DToPConfig(thresholds=thresholds))
    with torch.inference_mode():
        logits, trace = net(images, execution=Execution(mode=mode))
    tokens = trace.predictions[-1].scores().unflatten(2, trace.grid)
    torch.testing.assert_close(tokens, case["out.pred_tokens"], atol=PRED, rtol=0)
    assert (logits.argmax(1) != case["out.argmax"]).sum() <= 1
    if "out.pred" in case:
        torch.testing.assert_close(logits, case["out.pred"], atol=PRED, rtol=0)
        torch.testing.assert_close(images, case["input"], atol=0, rtol=0)
    for stage, exited in enumerate(trace.exited):
        assert torch.equal(exited, case[f"stage{stage}.mask_out"]), stage
    check_stages(net, images, case, mode)
    if "tokens.in" in case and mode == "packed":
        check_tokens(net, images, case)


def test_the_recorded_cases_let_tokens_leave(golden_dtop: Path) -> None:
    """So that the test above says something."""
    shares = [load_file(golden_dtop / f"eval_A_{n}_b3.safetensors")["stage2.mask_out"].float().mean(1) for n in CASES]
    assert not shares[0].any()
    assert sum(float(share.max()) > 0.2 for share in shares) >= 4
    mixed = load_file(golden_dtop / "eval_A_mixed_b3.safetensors")["stage0.mask_out"].any(1)
    assert mixed.any() and not mixed.all()


@pytest.mark.parametrize("kind", ["dense", "pruned"])
@pytest.mark.parametrize("name", ["128", "64", "90pad", "64x144"])
def test_other_sizes_equal_the_release(golden_dtop: Path, weights, name: str, kind: str) -> None:
    case, thresholds = recorded(golden_dtop / f"evalsize_A_{name}_{kind}.safetensors")
    net = segvit_segmenter(weights, **MODEL, policy=DToPConfig(thresholds=thresholds))
    images = case["input"]
    height, width = images.shape[2:]
    if name == "64x144":
        keep_stored_positions(net)
    check_stages(net, images, case)
    check_tokens(net, torch.nn.functional.pad(images, (0, -width % 16, 0, -height % 16)), case)
    if name == "64x144":  # the released picture of a rectangle is scrambled
        return
    with torch.inference_mode():
        logits, _ = net(images, head_size=(96, 96))
        own, _ = net(images)
    assert own.shape[2:] == logits.shape[2:] == (height, width)
    whole = (-(-height // 16) * 16, -(-width // 16) * 16)
    fixed = torch.nn.functional.interpolate(case["out.pred"], whole, mode="bilinear")
    torch.testing.assert_close(logits, fixed[..., :height, :width], atol=PRED, rtol=0)
    if name == "90pad":
        torch.testing.assert_close(own, case["out.pred"][..., :height, :width], atol=PRED, rtol=0)


def keep_stored_positions(net: SegmentationNet) -> None:
    """As the release does for every image with as many tokens as it has positions, whatever the shape."""
    stored = net.vit.get_parameter("pos_embed")[0]
    net.vit._grid_positions = lambda grid: stored


@pytest.mark.parametrize("kind", ["dense", "pruned"])
@pytest.mark.parametrize("name", ["96x128", "128x64", "80x80", "64x144"])
def test_rectangles_equal_the_release_up_to_its_picture(golden_dtop: Path, weights, name: str, kind: str) -> None:
    case, thresholds = recorded(golden_dtop / f"evaltokens_A_{name}_{kind}.safetensors")
    net = segvit_segmenter(weights, **MODEL, policy=DToPConfig(thresholds=thresholds))
    if name == "64x144":
        keep_stored_positions(net)
    with torch.inference_mode():
        logits, _ = net(case["input"])
    torch.testing.assert_close(logits, case["derived.pred"], atol=PRED, rtol=0)
    check_stages(net, case["input"], case)
    check_tokens(net, case["input"], case)


def segmenter(net: SegmentationNet, **options: Any) -> Segmenter:
    """A segmenter around the released network, for images that are normalised already."""
    head, policy = net.heads[0], net.policy
    assert isinstance(head, ATM)
    assert isinstance(policy, DToP)
    config = SegmenterConfig(
        vit=net.vit.config,
        policy=policy.config,
        input=InputConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), min_size=None),
        classes=tuple("abcdefg"),
        head=head.config,
        out_indices=net.out_indices,
        **options,
    )
    return Segmenter(config, net).eval()


@pytest.mark.parametrize("windows_at_once", [1, 8])
@pytest.mark.parametrize("kind", ["dense", "pruned"])
@pytest.mark.parametrize("name", ["150x200", "96x170", "130x130"])
def test_sliding_windows_equal_the_release(
    golden_dtop: Path, weights, name: str, kind: str, windows_at_once: int
) -> None:
    path = golden_dtop / f"slide_{name}_{kind}.safetensors"
    case, thresholds = recorded(path)
    with safe_open(path, framework="pt") as file:
        crop, stride = (int(file.metadata()[key]) for key in ("crop", "stride"))
    net = segvit_segmenter(weights, **MODEL, policy=DToPConfig(thresholds=thresholds))
    model = segmenter(net, crop=(crop, crop), stride=(stride, stride), windows_at_once=windows_at_once)
    with torch.inference_mode():
        scores = model.scores(list(case["input"]))
        labels = model(list(case["input"])).labels
    torch.testing.assert_close(scores[0][None], case["seg_logits"], atol=PRED, rtol=0)
    assert (labels[0] != case["argmax"][0]).sum() <= 1


@pytest.mark.parametrize("name", ["no_ignore", "ignore", "mixed", "mixed_w", "all_ignored"])
def test_atm_loss_equals_the_release(golden_dtop: Path, name: str) -> None:
    case = load_file(golden_dtop / f"atmloss_{name}.safetensors")
    settings = ATMLossConfig(ignored="background")
    if name == "mixed_w":  # every weight times loss_weight
        settings = ATMLossConfig(class_weight=0.2, mask_weight=2.0, dice_weight=0.8, ignored="background")
    classes, masks = (case[key].clone().requires_grad_() for key in ("pred_logits", "pred_masks"))
    losses = atm_loss(classes, masks, case["label"], config=settings)
    for released, own in TERMS.items():
        torch.testing.assert_close(losses[own].detach(), case[released][0], atol=1e-9, rtol=5e-5)
        inputs = {"pred_logits": classes} if own == "class" else {"pred_masks": masks}
        gradients = torch.autograd.grad(losses[own], list(inputs.values()), retain_graph=True)
        for key, gradient in zip(inputs, gradients, strict=True):
            assert_gradient(key, gradient, case[f"grad.{released}.{key}"])
    total = sum(losses.values())
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total.detach(), case["total"][0], atol=0, rtol=5e-5)
    total.backward()
    assert_gradient("pred_logits", classes.grad, case["grad_pred_logits"])
    assert_gradient("pred_masks", masks.grad, case["grad_pred_masks"])


def training(weights: dict[str, Tensor], thresholds: tuple[float, ...]) -> SegmentationNet:
    policy = DToPConfig(thresholds=thresholds)
    return without_dropout(segvit_segmenter(weights, **MODEL, policy=policy, released_loss=True))


def names_of(weights: dict[str, Tensor]) -> dict[str, str]:
    rules = (*VIT_RULES, *ATM_RULES)
    return released_names(weights, lambda state: rename(numbered_heads(state), rules, source="released"))


def stage_losses(net: SegmentationNet, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Any]:
    """All losses of all heads under the released names."""
    said, trace = net.predictions(images)
    losses = {}
    for name, head, prediction in zip(("aux_0", "aux_1", "decode"), net.heads, said.values(), strict=True):
        assert isinstance(head, SemanticHead)
        terms = head.losses(prediction, trace.grid, labels, 255)
        losses |= {f"{name}.{released}": terms[own] for released, own in TERMS.items()}
    return losses, trace


@pytest.mark.parametrize("name", ["dense", "pruned", "pruned_mixed", "pruned_b1"])
def test_training_equals_the_release(golden_dtop: Path, weights, name: str) -> None:
    case, thresholds = recorded(golden_dtop / f"train_A_{name}.safetensors")
    net = training(weights, thresholds)
    images = case["input"].clone().requires_grad_()
    losses, trace = stage_losses(net, images, case["label"])
    for stage, (prediction, exited) in enumerate(zip(trace.predictions, trace.exited, strict=True)):
        assert torch.equal(exited, case[f"stage{stage}.mask_out"])
        torch.testing.assert_close(prediction.maps.detach(), case[f"stage{stage}.canvas_out"], atol=CANVAS, rtol=0)
        torch.testing.assert_close(prediction.scores().detach(), case[f"stage{stage}.pred"], atol=PRED, rtol=0)
    assert len(losses) == 9
    for key, value in losses.items():
        torch.testing.assert_close(value.detach(), case[f"loss.{key}"][0], atol=0, rtol=5e-5, msg=key)
    own = without_dropout(segmenter(net))(list(case["input"]), [{"labels": labels} for labels in case["label"]]).losses
    stages = {"aux_0": "aux_0_", "aux_1": "aux_1_", "decode": ""}
    summed = {f"{stage}.{key}": own[prefix + name] for stage, prefix in stages.items() for key, name in TERMS.items()}
    torch.testing.assert_close(summed, losses)
    total = sum(losses.values())
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total.detach(), case["total"][0], atol=0, rtol=5e-5)
    total.backward()
    assert_gradient("input", images.grad, case["grad.input"])
    names, parameters, checked = names_of(weights), dict(net.named_parameters()), 0
    for key, expected in case.items():
        key = key.removeprefix("grad.")
        if key == "input" or key not in weights:
            continue
        checked += 1
        if key == "backbone.cls_token":
            assert not expected.any()
            continue
        own, scale = parameters[names[key]].grad, None
        assert own is not None, key
        if key == "backbone.pos_embed":
            expected = expected[:, 1:]
        elif key.endswith("in_proj_bias"):  # a constant added to every key changes no softmax
            (first, noise, last), (q, k, v) = expected.chunk(3), own.chunk(3)
            assert_gradient(key, k, noise, float(expected.abs().max()))
            expected, own = torch.cat([first, last]), torch.cat([q, v])
        elif key.endswith("multihead_attn.k.bias") and "layers.2" not in key:
            scale = 1.0
        assert_gradient(key, own, expected, scale)
    assert checked == 295


def test_three_steps_of_adamw_equal_the_release(golden_dtop: Path, weights) -> None:
    case, thresholds = recorded(golden_dtop / "train_A_pruned.safetensors")
    after = {k.removeprefix("step3."): v for k, v in load_file(golden_dtop / "train_A_adamw3.safetensors").items()}
    totals = json.loads((golden_dtop / "optim_index.json").read_text())["losses_total_per_step"]
    net = training(weights, thresholds)
    heads = [p for n, p in net.named_parameters() if n.startswith("heads.")]
    rest = [p for n, p in net.named_parameters() if not n.startswith("heads.")]
    groups = [{"params": rest, "lr": 2e-5}, {"params": heads, "lr": 2e-4}]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    for expected in totals:
        losses, _ = stage_losses(net, case["input"], case["label"])
        total = torch.stack(list(losses.values())).sum()
        assert float(total.detach()) == pytest.approx(expected, rel=1e-4)
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
    names, own = names_of(weights), net.state_dict()
    for key, expected in after.items():
        if key == "backbone.cls_token" or (key.endswith("multihead_attn.k.bias") and "layers.2" not in key):
            continue  # their gradient is round-off, which Adam makes large
        value = own[names[key]]
        if key == "backbone.pos_embed":
            expected = expected[:, 1:]
        if key.endswith("in_proj_bias"):
            value, expected = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (value, expected))
        far = (value - expected).abs() > 5e-6
        # one tensor has some gradients that all but vanish; the record names it
        noisy = key == "decode_head.decoder.layers.2.self_attn.in_proj_weight"
        assert far.float().mean() <= (0.01 if noisy else 0), key


def test_the_released_loss_has_to_be_asked_for(golden_dtop: Path, weights) -> None:
    case = load_file(golden_dtop / "atmloss_ignore.safetensors")
    net = segvit_segmenter(weights, **MODEL, policy=DToPConfig(thresholds=(1.0,)))
    head = net.heads[0]
    assert isinstance(head, ATM)
    assert head.config.loss.ignored == "excluded"
    losses = atm_loss(case["pred_logits"], case["pred_masks"], case["label"])
    assert float(losses["mask"]) != pytest.approx(float(case["loss_mask"]), rel=1e-3)
    assert float(losses["class"]) == pytest.approx(float(case["loss_ce"]), rel=5e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_the_published_rule_counts_what_the_papers_tool_counted(golden_dtop: Path, weights, name: str, batch: int):
    said = json.loads((golden_dtop / "flops.json").read_text())["small_cases"][f"small_A_{name}_b{batch}"]
    images = load_file(golden_dtop / "eval_A_input.safetensors")["input"][:batch]
    net = segvit_segmenter(weights, **MODEL, policy=DToPConfig(thresholds=tuple(said["thresh"])))
    with torch.no_grad():
        _, trace = net(images)
    got = published_macs(net.vit.config, ATMConfig(channels=32, num_heads=2), 7, net.out_indices, trace)
    around = said["by_operator"]["upsample_bilinear2d"]
    assert around == batch * 4 * 7 * 96 * 96, "counted without the second resizing, of the code around the net"
    assert round(got.sum().item()) == said["total"] + around


# SETR-like heads, and those of mmsegmentation.


MLP_RULES: Rules = (
    (r"(|.*\.)layer\.(layers\..*)", r"\1\2"),
    (r"(|.*\.)conv_seg\..*", None),  # the released head has it and does not use it
)
NAIVE_RULES: Rules = (
    (r"(.*\.norm)\.(weight|bias)", r"\1.\2"),
    (r"(.*)\.up_convs\.0\.0\.conv\.weight", r"\1.fc1.weight"),
    (r"(.*)\.up_convs\.0\.0\.bn\.(.*)", r"\1.bn.\2"),
    (r"(.*)\.conv_seg\.(.*)", r"\1.fc2.\2"),
)
BACKBONE_RULES: Rules = (
    (r"backbone\.(cls_token)", r"vit.\1"),
    (r"backbone\.ln1\.(.*)", r"vit.norm.\1"),
    *VIT_RULES,
)


def state_of(case: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix("state."): value for key, value in case.items() if key.startswith("state.")}


def canvas(features: Tensor) -> Tokens:
    """(b, c, h, w) as tokens."""
    return Tokens(features.flatten(2).transpose(1, 2), (features.shape[2], features.shape[3]))


def known(labels: Tensor) -> Tensor:
    """The share of labelled pixels: mmsegmentation divides the sum over them by the number of all pixels."""
    return (labels != 255).float().mean()


def mlp(state: dict[str, Tensor]) -> SemanticHead:
    head = build_head(MLPConfig(hidden_dim=128), embed_dim=64, num_classes=7)
    load_strictly(head, rename(state, MLP_RULES, source="an MLP head"), source="an MLP head")
    return head


def test_mlp_head_equals_the_release(golden_dtop: Path) -> None:
    case = load_file(golden_dtop / "setr_mlphead.safetensors")
    head, features = mlp(state_of(case)), case["feat"].clone().requires_grad_()
    prediction = head(canvas(features))
    torch.testing.assert_close(prediction.maps.detach().unflatten(2, (6, 6)), case["logits"], atol=1e-4, rtol=0)
    (loss,) = head.losses(prediction, (6, 6), case["label"].long(), 255).values()
    loss = loss * known(case["label"])
    torch.testing.assert_close(loss.detach(), case["loss_ce"][0], atol=0, rtol=5e-5)
    loss.backward()
    assert_gradient("feat", features.grad, case["grad_feat"])
    for key, parameter in head.named_parameters():
        assert_gradient(key, parameter.grad, case[f"grad.layer.{key}"])


def test_mlp_head_on_some_tokens_equals_the_release(golden_dtop: Path) -> None:
    """The released head repeats the logits of each given token for the 256 pixels of its patch."""
    case = load_file(golden_dtop / "setr_mlphead_cropidx.safetensors")
    head = mlp(state_of(load_file(golden_dtop / "setr_mlphead.safetensors")))
    places, given = case["crop_idx"].long(), case["tokens"]
    x = torch.full((2, 36, 64), torch.nan)
    x[:, places] = given
    part = torch.zeros(2, 36, dtype=torch.bool)
    part[:, places] = True
    with torch.inference_mode():
        maps = head(Tokens(x, (6, 6)), part).maps
    expected = case["logits"][..., 0].unflatten(2, (4, 256))
    torch.testing.assert_close(maps[:, :, places, None].expand_as(expected), expected, atol=1e-4, rtol=0)
    assert not maps[:, :, ~part[0]].any()


def network(state: dict[str, Tensor], heads: list[SemanticHead], rules: Rules, places: tuple[int, ...]):
    """mmsegmentation's ViT with heads behind its blocks, and the names that the release gives to its parameters."""
    numbered = {}
    for key, value in state.items():
        new = key.replace("auxiliary_head.", "heads.").replace("decode_head.", f"heads.{len(heads) - 1}.")
        numbered[new] = value[:, :, 0, 0] if new.startswith("heads.") and value.shape[2:] == (1, 1) else value
    vit = ViT(ViTConfig(grid=(6, 6), embed_dim=64, depth=6, num_heads=4, class_token=True, final_norm=True))
    net = SegmentationNet(vit=vit, policy=KeepAllConfig(), heads=heads, out_indices=places)
    source = "mmsegmentation's SETR"
    renamed = partial(rename, rules=(*BACKBONE_RULES, *rules), source=source)
    load_strictly(net, renamed(numbered), source=source)
    theirs = dict(zip(numbered, state, strict=True))
    return net, {ours: theirs[key] for key, ours in released_names(numbered, renamed).items()}


def check_network(case: dict[str, Tensor], net: SegmentationNet, names: dict[str, str], grid: tuple[int, int]) -> None:
    """What heads say on `grid`, the answer, losses and gradients."""
    stages = [f"aux_{i}" for i in range(len(net.heads) - 1)] + ["decode"]
    without_dropout(net)
    with torch.inference_mode():
        answer, _ = net.eval()(case["input"], head_size=grid)
    torch.testing.assert_close(answer, case["out.encode_decode"], atol=1e-4, rtol=0)

    for i, (stage, head) in enumerate(zip(stages, net.heads, strict=True)):
        with torch.inference_mode():
            maps = head(canvas(case[f"feat.{i}"])).maps.unflatten(2, (6, 6))
        torch.testing.assert_close(resize(maps, grid), case[f"{stage}.logits"], atol=1e-4, rtol=0)
    said, trace = net.train().predictions(case["input"])
    assert list(said) == list(net.out_indices)
    total = torch.zeros(())
    for stage, prediction in zip(stages, said.values(), strict=True):
        logits = resize(prediction.maps.unflatten(2, trace.grid), grid)
        loss = pixel_loss(logits, case["label"].long()) * known(case["label"])
        weight = round(float(case[f"loss.{stage}.loss_ce"] / loss.detach()), 4)
        assert weight in (1.0, 0.4), stage
        torch.testing.assert_close(weight * loss.detach(), case[f"loss.{stage}.loss_ce"][0], atol=0, rtol=5e-5)
        total = total + weight * loss
    torch.testing.assert_close(total.detach(), case["total"][0], atol=0, rtol=5e-5)
    total.backward()
    checked = 0
    for name, parameter in net.named_parameters():
        if f"grad.{names[name]}" in case:
            assert_gradient(name, parameter.grad, case[f"grad.{names[name]}"])
            checked += 1
    assert checked == sum(key.startswith("grad.") for key in case)


def test_mlp_heads_on_a_vit_equal_the_release(golden_dtop: Path) -> None:
    case = load_file(golden_dtop / "setr_vit_mlphead.safetensors")
    heads = [build_head(MLPConfig(hidden_dim=128), embed_dim=64, num_classes=7) for _ in range(3)]
    net, names = network(state_of(case), heads, MLP_RULES, (1, 3, 5))
    check_network(case, net, names, (6, 6))


def undo_running_average(head: SemanticHead, features: Tensor) -> None:
    """The weights were stored after the one training step and the logits taken before it."""
    assert isinstance(head, SETRNaive)
    assert head.bn.running_mean is not None and head.bn.running_var is not None
    with torch.no_grad():
        x = head.fc1(head.norm(canvas(features).x)).flatten(0, 1)
        head.bn.running_mean.sub_(0.1 * x.mean(0)).div_(0.9)
        head.bn.running_var.sub_(0.1 * x.var(0)).div_(0.9)


def test_setr_naive_equals_the_release(golden_dtop: Path) -> None:
    """The released heads resize to four times the grid; ours say what they say per token."""
    case = load_file(golden_dtop / "setr_naive_small.safetensors")
    heads = [build_head(SETRNaiveConfig(channels=32), embed_dim=64, num_classes=7) for _ in range(4)]
    state = {key: value for key, value in state_of(case).items() if "num_batches" not in key}
    state |= {
        key.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for key in state if "running_mean" in key
    }
    net, names = network(state, heads, NAIVE_RULES, (1, 2, 4, 5))
    for i, head in enumerate(heads):
        undo_running_average(head, case[f"feat.{i}"])
    check_network(case, net, names, (24, 24))

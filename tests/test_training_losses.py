"""Losses of ALIKED, LightGlue and XFeat against slow references and by gradient check; networks in training form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from frontends.aliked_network import ARCHITECTURES, AlikedNetwork, deformable_conv2d
from frontends.lightglue_network import LightGlueArchitecture, LightGlueNetwork
from frontends.training import aliked_losses, xfeat_losses
from frontends.training.aliked_losses import peaky_loss, reliable_loss, reprojection_loss, sparse_nre_loss
from frontends.training.aliked_trainable import described, training_maps
from frontends.training.distillation import initialise
from frontends.training.labels import IGNORED, UNMATCHABLE, MatchLabels
from frontends.training.lightglue_losses import (
    LightGlueInputs,
    assignment_loss,
    confidence_loss,
    decisions,
    deep_supervision_loss,
    layer_assignments,
)
from frontends.training.xfeat_losses import (
    NO_KEYPOINT,
    dual_softmax_loss,
    fine_offset_loss,
    keypoint_classes,
    keypoint_loss,
)
from frontends.training.xfeat_trainable import TrainableXFeat
from frontends.xfeat_network import load_network


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(seed), dtype=torch.float64)


def has_its_gradient(function: Callable[..., Tensor], *values: Tensor) -> bool:
    return bool(torch.autograd.gradcheck(function, tuple(value.requires_grad_() for value in values)))


# ---------------------------------------------------------------- ALIKED


def test_reprojection_is_half_the_mean_distances_of_both_ways() -> None:
    points = [rand(7, 2, seed=seed) * 10 for seed in range(4)]
    there = [math.dist(a, b) for a, b in zip(points[2].tolist(), points[1].tolist(), strict=True)]
    back = [math.dist(a, b) for a, b in zip(points[3].tolist(), points[0].tolist(), strict=True)]
    expected = (sum(there) / 7 + sum(back) / 7) / 2
    assert float(reprojection_loss(*points)) == pytest.approx(expected, abs=1e-6)
    assert has_its_gradient(reprojection_loss, *points)
    assert float(reprojection_loss(*(torch.zeros(0, 2),) * 4)) == 0.0


def slow_peaky(score_map: Tensor, keypoints: Tensor, chosen: Tensor) -> float:
    values = []
    for b, k in chosen.nonzero().tolist():
        x, y = keypoints[b, k].tolist()
        window = [(round(x) + i, round(y) + j) for i in range(-2, 3) for j in range(-2, 3)]
        weights = [math.exp(float(score_map[b, 0, row, column]) / 0.1) for column, row in window]
        values.append(sum(w * math.dist(p, (x, y)) for w, p in zip(weights, window, strict=True)) / sum(weights))
    return sum(values) / len(values)


def test_peaky_is_the_mean_weighted_distance_and_falls_for_sharper_peaks() -> None:
    score_map, keypoints = rand(2, 1, 12, 14), 3 + rand(2, 5, 2, seed=1) * 5
    chosen = torch.tensor([[True] * 5, [True, False, True, False, True]])
    assert float(peaky_loss(score_map, keypoints, chosen)) == pytest.approx(slow_peaky(score_map, keypoints, chosen))
    assert has_its_gradient(lambda s, k: peaky_loss(s, k, chosen), score_map, keypoints)
    flat, sharp = torch.full((1, 1, 9, 9), 0.5), torch.zeros(1, 1, 9, 9)
    sharp[0, 0, 4, 4] = 1.0
    middle, yes = torch.tensor([[[4.0, 4.0]]]), torch.ones(1, 1, dtype=torch.bool)
    assert float(peaky_loss(sharp, middle, yes)) < 0.01 < float(peaky_loss(flat, middle, yes))


PARTNER = torch.tensor([2, -1, 0, 4, -1, 1])


def test_the_sparse_error_is_the_cross_entropy_at_the_true_match() -> None:
    similarity = rand(6, 5) * 2 - 1
    terms = []
    for row, column in enumerate(PARTNER.tolist()):
        if column >= 0:
            exponents = [math.exp((float(value) - 1) / 0.2) for value in similarity[row]]
            terms.append(-math.log(exponents[column] / sum(exponents)))
    assert float(sparse_nre_loss(similarity, PARTNER, 0.2)) == pytest.approx(sum(terms) / len(terms))
    assert has_its_gradient(lambda s: sparse_nre_loss(s, PARTNER, 0.2), similarity)
    assert float(sparse_nre_loss(similarity, torch.full((6,), -1), 0.2).detach()) == 0.0


def test_reliability_weighs_scores_and_is_itself_not_trained() -> None:
    similarity, scores0, scores1 = rand(6, 5) * 2 - 1, rand(6, seed=1) + 0.1, rand(5, seed=2) + 0.1
    above = below = 0.0
    for row, column in enumerate(PARTNER.tolist()):
        if column >= 0:
            exponents = [math.exp((float(value) - 1) / 0.3) for value in similarity[row]]
            weight = float(scores0[row] * scores1[column])
            above += (1 - exponents[column] / sum(exponents)) * weight
            below += weight
    assert float(reliable_loss(similarity, PARTNER, scores0, scores1, 0.3)) == pytest.approx(above / below)
    assert has_its_gradient(lambda a, b: reliable_loss(similarity, PARTNER, a, b, 0.3), scores0, scores1)
    similarity.requires_grad_()
    reliable_loss(similarity, PARTNER, scores0, scores1, 0.3).backward()
    assert similarity.grad is None
    assert float(reliable_loss(similarity, torch.full((6,), -1), scores0, scores1, 0.3).detach()) == 0.0


def test_the_published_weights_and_numbers_are_the_defaults() -> None:
    config = aliked_losses.AlikedLossConfig()
    assert (config.reprojection, config.peaky, config.descriptors, config.reliable) == (1.0, 0.5, 5.0, 1.0)
    assert (config.num_detected, config.num_random) == (400, 400)


# ---------------------------------------------------------------- LightGlue

LABELS = MatchLabels(
    torch.tensor([[1, UNMATCHABLE, IGNORED, 0], [2, 0, UNMATCHABLE, UNMATCHABLE]]),
    torch.tensor([[3, 0, IGNORED], [1, UNMATCHABLE, 0]]),
)


def slow_assignment_loss(log_assignment: Tensor, labels: MatchLabels) -> float:
    matched, alone0, alone1 = [], [], []
    for b in range(len(log_assignment)):
        for i, j in enumerate(labels.partner0[b].tolist()):
            if j >= 0:
                matched.append(-float(log_assignment[b, i, j]))
            elif j == UNMATCHABLE:
                alone0.append(-float(log_assignment[b, i, -1]))
        for j, i in enumerate(labels.partner1[b].tolist()):
            if i == UNMATCHABLE:
                alone1.append(-float(log_assignment[b, -1, j]))
    means = [sum(values) / len(values) for values in (matched, alone0, alone1)]
    return means[0] + (means[1] + means[2]) / 2


def test_the_assignment_loss_is_equation_10() -> None:
    layers = [rand(2, 5, 4, seed=seed).log() for seed in range(3)]
    expected = [slow_assignment_loss(layer, LABELS) for layer in layers]
    assert float(assignment_loss(layers[0], LABELS)) == pytest.approx(expected[0])
    assert float(deep_supervision_loss(layers, LABELS)) == pytest.approx(sum(expected) / 3)
    assert has_its_gradient(lambda a: assignment_loss(a, LABELS), layers[0])


def test_what_is_ignored_costs_nothing_and_moves_nothing() -> None:
    assignment = rand(2, 5, 4).log().requires_grad_()
    assignment_loss(assignment, LABELS).backward()
    assert assignment.grad is not None and float(assignment.grad[0, 2].abs().sum()) == 0.0
    infinite = assignment.detach().clone()
    infinite[0, 2] = -torch.inf
    assert math.isfinite(float(assignment_loss(infinite, LABELS)))
    nothing = MatchLabels(torch.full((2, 4), IGNORED), torch.full((2, 3), IGNORED))
    assert float(assignment_loss(infinite, nothing)) == 0.0


def matcher() -> tuple[LightGlueNetwork, LightGlueInputs]:
    torch.manual_seed(0)
    network = LightGlueNetwork(LightGlueArchitecture(input_dim=8, width=16, num_heads=2, num_layers=3))
    mask0, mask1 = torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    mask0[1, 3] = False
    parts = (torch.randn(2, 4, 8), torch.randn(2, 3, 8), torch.rand(2, 4, 2), torch.rand(2, 3, 2))
    return network, LightGlueInputs(*parts, mask0, mask1)


def test_the_last_layer_is_what_the_network_says_and_every_layer_learns() -> None:
    network, inputs = matcher()
    assignments, _ = layer_assignments(network, inputs)
    given = (inputs.descriptors0, inputs.descriptors1, inputs.coordinates0, inputs.coordinates1)
    torch.testing.assert_close(assignments[-1], network(*given, inputs.mask0, inputs.mask1))
    deep_supervision_loss(assignments, LABELS).backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert all(name.startswith("token_confidence") for name in without)


def test_decisions_are_mutual_and_above_the_threshold() -> None:
    scores = torch.full((1, 4, 3), 1e-4)
    scores[0, 0, 1], scores[0, 1, 1], scores[0, 2, 0] = 0.9, 0.95, 0.05
    found0, found1 = decisions(scores.log())
    assert found0.tolist() == [[-1, 1, -1]] and found1.tolist() == [[-1, 1]]


def test_confidence_compares_every_layer_with_the_last_and_trains_the_heads_alone() -> None:
    network, inputs = matcher()
    assignments, states = layer_assignments(network, inputs)
    sharp = [assignment.detach() + 2.0 for assignment in assignments]
    loss = confidence_loss(network, states, sharp, inputs)
    last = decisions(sharp[-1])
    terms = []
    for layer in range(2):
        now = decisions(sharp[layer])
        for side, mask in ((0, inputs.mask0), (1, inputs.mask1)):
            confidence = network.token_confidence[layer](states[layer][side]).detach()
            agrees = now[side] == last[side]
            wrong = [
                -math.log(float(c) if a else 1 - float(c))
                for c, a, m in zip(confidence.flatten(), agrees.flatten(), mask.flatten(), strict=True)
                if m
            ]
            terms.append(sum(wrong) / len(wrong))
    assert float(loss.detach()) == pytest.approx(sum(terms) / 4, abs=1e-5)
    loss.backward()
    trained = {name.split(".")[0] for name, p in network.named_parameters() if p.grad is not None}
    assert trained == {"token_confidence"}


# ---------------------------------------------------------------- XFeat


def test_dual_softmax_is_the_likelihood_of_the_diagonal_both_ways() -> None:
    one, two = rand(5, 4), rand(5, 4, seed=1)
    similarity = [[3.0 * sum(a * b for a, b in zip(p, q, strict=True)) for q in two.tolist()] for p in one.tolist()]
    rows = [[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in similarity]
    columns = [
        [math.exp(similarity[i][j]) / sum(math.exp(similarity[k][j]) for k in range(5)) for j in range(5)]
        for i in range(5)
    ]
    expected = -sum(math.log(rows[i][i]) + math.log(columns[i][i]) for i in range(5)) / 5
    loss, confidence = dual_softmax_loss(one, two, sharpness=3.0)
    assert float(loss) == pytest.approx(expected)
    wanted = [max(rows[i]) * max(columns[j][i] for j in range(5)) for i in range(5)]
    assert confidence.tolist() == pytest.approx(wanted)
    assert has_its_gradient(lambda a, b: dual_softmax_loss(a, b, 3.0)[0], one, two)


def test_reliability_approaches_the_confidence_which_stays() -> None:
    one, two, confidence = rand(6), rand(6, seed=1), rand(6, seed=2).requires_grad_()
    expected = sum(
        abs(a - c) + abs(b - c) for a, b, c in zip(one.tolist(), two.tolist(), confidence.tolist(), strict=True)
    )
    assert float(xfeat_losses.reliability_loss(one, two, confidence)) == pytest.approx(expected / 12)
    assert has_its_gradient(lambda a, b: xfeat_losses.reliability_loss(a, b, confidence), one, two)
    assert confidence.grad is None


def test_offsets_are_told_by_cross_entropy() -> None:
    logits, classes = rand(5, 64), torch.tensor([0, 63, 7, 8, 31])
    terms = [
        -math.log(math.exp(2 * float(row[c])) / sum(math.exp(2 * float(v)) for v in row))
        for row, c in zip(logits, classes.tolist(), strict=True)
    ]
    assert float(fine_offset_loss(logits, classes, 2.0)) == pytest.approx(sum(terms) / 5)
    assert has_its_gradient(lambda x: fine_offset_loss(x, classes, 2.0), logits)
    assert float(fine_offset_loss(torch.zeros(0, 64), torch.zeros(0, dtype=torch.int64))) == 0.0


def test_a_cell_takes_its_best_keypoint() -> None:
    keypoints = torch.tensor([[[9.2, 3.0], [12.0, 5.0], [0.0, 15.4], [-3.0, 4.0], [20.0, 9.0]]])
    valid = torch.tensor([[True, True, True, True, False]])
    classes = keypoint_classes(keypoints, valid, (24, 16))
    assert classes.tolist() == [[[NO_KEYPOINT, 3 * 8 + 1, NO_KEYPOINT], [7 * 8 + 0, NO_KEYPOINT, NO_KEYPOINT]]]


def test_empty_cells_are_capped() -> None:
    logits, classes = rand(1, 6, 6, 65), torch.full((1, 6, 6), NO_KEYPOINT)
    classes[0, 2, 3], classes[0, 4, 4] = 11, 12
    log = logits.log_softmax(dim=-1)
    filled = [-float(log[0, 2, 3, 11]), -float(log[0, 4, 4, 12])]
    empty = sorted(-float(v) for v in log[..., NO_KEYPOINT][classes == NO_KEYPOINT])
    loss = float(keypoint_loss(logits, classes, seeded()))
    assert sum(filled) + sum(empty[:2]) <= 4 * loss <= sum(filled) + sum(empty[-2:])
    everything = float(keypoint_loss(logits, classes, seeded(), max_empty_ratio=100.0))
    assert everything == pytest.approx((sum(filled) + sum(empty)) / 36)
    small, few = rand(1, 2, 2, 65), torch.tensor([[[5, NO_KEYPOINT], [NO_KEYPOINT, NO_KEYPOINT]]])
    assert has_its_gradient(lambda x: keypoint_loss(x, few, seeded()), small)


# ---------------------------------------------------------------- networks as training sees them


def aliked() -> AlikedNetwork:
    torch.manual_seed(0)
    network = AlikedNetwork(ARCHITECTURES["t16"])
    initialise(network)
    for conv in (m for m in network.modules() if type(m).__name__ == "DeformableConv2d"):
        torch.nn.init.normal_(conv.offset_conv.weight, std=0.05)
    return network.eval()


def test_the_training_form_of_aliked_is_the_plain_network() -> None:
    network, images = aliked(), torch.rand(2, 3, 64, 96)
    keypoints = torch.rand(2, 20, 2) * torch.tensor([95.0, 63.0])
    plain = network(images)
    maps = training_maps(network, images)
    torch.testing.assert_close(maps.score_map, plain.score_map, atol=1e-5, rtol=1e-4)
    expected = network.describe(plain.feature_map, keypoints)
    torch.testing.assert_close(described(network, maps, keypoints), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="multiples of 32"):
        training_maps(network, torch.rand(1, 3, 60, 96))


def test_the_training_form_of_aliked_has_the_gradients_of_the_plain_network() -> None:
    images, keypoints = torch.rand(1, 3, 64, 64), 4 + torch.rand(1, 9, 2) * 50
    gradients = []
    for is_plain in (True, False):
        network = aliked()
        if is_plain:
            maps = network(images)
            scores, descriptors = maps.score_map, network.describe(maps.feature_map, keypoints)
        else:
            other = training_maps(network, images)
            scores, descriptors = other.score_map, described(network, other, keypoints)
        (scores.square().sum() + (descriptors * torch.linspace(-1, 1, 64)).sum()).backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    for name, value in gradients[0].items():
        assert value is not None
        torch.testing.assert_close(gradients[1][name], value, atol=2e-3 * float(value.abs().max()) + 1e-6, rtol=0)


def test_blocks_apart_read_what_they_are_given() -> None:
    network, images = aliked(), torch.rand(1, 3, 64, 64)
    maps = training_maps(network, images)
    same = training_maps(network, images, maps.stages)
    torch.testing.assert_close(same.score_logits, maps.score_logits)
    other = training_maps(network, images, tuple(torch.zeros_like(stage) for stage in maps.stages))
    torch.testing.assert_close(other.stages[0], maps.stages[0])
    assert not torch.allclose(other.stages[3], maps.stages[3])


def test_the_training_form_of_xfeat_is_the_network_of_its_own_state_dict() -> None:
    torch.manual_seed(0)
    trainable = TrainableXFeat()
    initialise(trainable)
    images = torch.rand(2, 3, 64, 96)
    trainable(images)  # batch norms with something in them
    trainable.eval()
    with torch.no_grad():
        mine = trainable(images)
        fast = load_network(trainable.state_dict(), torch.device("cpu"))(images.mean(dim=1, keepdim=True))
    for name in ("descriptors", "reliability", "keypoint_logits"):
        torch.testing.assert_close(getattr(mine, name), getattr(fast, name), atol=2e-4, rtol=1e-3)
    taps = trainable.taps(images)
    again = trainable.taps(images, taps.stages)
    torch.testing.assert_close(again.maps.reliability, taps.maps.reliability)


@pytest.mark.parametrize("name", ["aliked", "xfeat", "lightglue"])
def test_bfloat16_changes_losses_little_and_keeps_gradients_finite(name: str) -> None:
    """What a GPU trains in; wide images, whose places bfloat16 alone could not tell apart."""
    torch.manual_seed(0)
    images = torch.rand(1, 3, 64, 512)
    places = torch.rand(1, 12, 2) * torch.tensor([500.0, 60.0])
    network: torch.nn.Module
    if name == "lightglue":
        network, inputs = matcher()

        def loss() -> Tensor:
            return deep_supervision_loss(layer_assignments(network, inputs)[0], LABELS)  # type: ignore[arg-type]
    elif name == "aliked":
        network = aliked()

        def loss() -> Tensor:
            maps = training_maps(network, images)  # type: ignore[arg-type]
            found = described(network, maps, places)  # type: ignore[arg-type]
            return maps.score_logits.float().std() + (found * torch.linspace(-1, 1, 64)).sum().abs()
    else:
        network = TrainableXFeat()
        initialise(network)

        def loss() -> Tensor:
            maps = network(images)
            return maps.descriptors.float().std() + maps.keypoint_logits.float().std()

    expected = float(loss().detach())
    with torch.autocast("cpu", torch.bfloat16):
        low = loss()
    low.backward()
    assert float(low.detach()) == pytest.approx(expected, rel=0.1)
    gradients = [p.grad for p in network.parameters() if p.grad is not None]
    assert gradients and all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def test_the_places_of_a_deformable_convolution_are_told_exactly_in_bfloat16() -> None:
    features = torch.rand(1, 4, 3, 700)
    offsets, weight = torch.zeros(1, 18, 3, 700), torch.randn(4, 4, 3, 3)
    plain = torch.nn.functional.conv2d(features, weight, padding=1)
    low = deformable_conv2d(features.bfloat16(), offsets.bfloat16(), weight)
    assert float((low - plain).abs().max()) < 0.05 * float(plain.abs().max())

"""SdAE against its equations, written out token by token, and against the official code's facts."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from test_mae import check_two_processes, slow_decoder, slow_encoder, some_views

from ssl_bench.errors import UserError
from ssl_bench.evaluate.architecture import named
from ssl_bench.evaluate.backbone import Backbone
from ssl_bench.evaluate.training.loader import Views
from ssl_bench.evaluate.training.schedules import Progress
from ssl_bench.pretrain import sdae
from ssl_bench.pretrain.networks import sincos_positions

# 16 patches: 4 visible, 12 hidden in 3 folds of 4.
TINY = dataclasses.replace(
    sdae.RECIPES["paper"], arch="vit_24x2x2_patch8_32", decoder_dim=16, decoder_depth=2, decoder_heads=2, drop_path=0.0
)
WHOLE = {"teacher_input": "image", "folds": 1}


def tiny_method(seed=0, **changes):
    """A small SdAE in which nothing is at its initial zero or one, and the teacher is not the student."""
    recipe = dataclasses.replace(TINY, **changes)
    torch.manual_seed(seed)
    method = sdae.make(recipe, named(recipe.arch), None)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if parameter.requires_grad or name.startswith("teacher."):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return method.train()


def views_of(method, **kwargs):
    return some_views(sdae, method.recipe, **kwargs)


def slow_targets(method, image, folds):
    """The teacher's normalized features of each fold's patches: every fold by itself through the encoder. float64"""
    targets = []
    for fold in folds:
        if method.recipe.teacher_input == "image":
            features = slow_encoder(method.teacher, image, range(16))[1:][fold]
        else:
            features = slow_encoder(method.teacher, image, fold)[1:]
        features = features.detach().double().numpy()
        if method.recipe.normalize_teacher:
            mean = features.mean(1, keepdims=True)
            features = (features - mean) / np.sqrt(features.var(1, ddof=1, keepdims=True) + 1e-6)
        targets.append(features)
    return targets


def slow_cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(a * a)) / math.sqrt(sum(b * b))


def slow_loss(method, views, folds_of):
    """One image after the other, in the words of the reading."""
    reading, cosines = method.recipe.cosine, []
    for image, order in zip(views.images[0], views.draws[0], strict=True):
        visible, folds = order[:4], folds_of(order[4:])
        with torch.no_grad():
            decoded = slow_decoder(method, slow_encoder(method.student, image, visible), visible, 4).double().numpy()
            targets = slow_targets(method, image, folds)
        predictions = [decoded[fold.numpy()] for fold in folds]
        if reading == "masked":
            predictions, targets = [np.concatenate(predictions)], [np.concatenate(targets)]
        for prediction, target in zip(predictions, targets, strict=True):
            if reading == "channels":
                cosines += [slow_cosine(prediction[token], target[token]) for token in range(len(target))]
            else:
                cosines += [slow_cosine(prediction[:, channel], target[:, channel]) for channel in range(24)]
    return 1 - sum(cosines) / len(cosines), len(cosines)


def three_folds(hidden):
    return [hidden[0:4], hidden[4:8], hidden[8:12]]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("reading", "count"),
    [("fold", 4 * 3 * 24), ("masked", 4 * 24), ("channels", 4 * 12)],  # images x folds x channels; images x tokens
)
def test_the_loss_is_the_papers_in_each_reading(reading, count, normalize):
    method = tiny_method(cosine=reading, normalize_teacher=normalize)
    views = views_of(method)
    expected, counted = slow_loss(method, views, three_folds)
    loss = method(views)
    assert counted == count
    assert list(loss) == ["cosine"]
    assert loss["cosine"].dtype == torch.float32
    assert loss["cosine"].item() == pytest.approx(expected, abs=2e-6)


def test_the_readings_and_the_normalization_differ():
    """So that the tests above tell them apart."""
    losses = [
        method(views_of(method))["cosine"].item()
        for reading in ("fold", "masked", "channels")
        for normalize in (True, False)
        for method in [tiny_method(cosine=reading, normalize_teacher=normalize)]
    ]
    assert min(abs(a - b) for i, a in enumerate(losses) for b in losses[:i]) > 1e-4


# What the teacher sees: the whole image; all that is hidden; a crop of it; folds that leave a rest.
INPUTS = {
    "image": (WHOLE, lambda hidden: [hidden]),
    "only masked": ({"folds": 1}, lambda hidden: [hidden]),
    "crop": ({"folds": 1, "fold_patches": 5}, lambda hidden: [hidden[:5]]),
    "two folds": ({"folds": 2}, lambda hidden: [hidden[:6], hidden[6:]]),
    "a rest": ({"folds": 5}, lambda hidden: [hidden[2 * fold : 2 * fold + 2] for fold in range(5)]),
    "small folds": ({"folds": 2, "fold_patches": 3}, lambda hidden: [hidden[:3], hidden[3:6]]),
}


@pytest.mark.parametrize("reading", ["fold", "masked", "channels"])
@pytest.mark.parametrize("name", INPUTS)
def test_every_input_of_the_teacher(name, reading):
    changes, folds_of = INPUTS[name]
    method = tiny_method(**changes, cosine=reading)
    views = views_of(method)
    assert method(views)["cosine"].item() == pytest.approx(slow_loss(method, views, folds_of)[0], abs=2e-6)


def test_folds_see_nothing_of_each_other_and_of_the_visible_patches():
    method = tiny_method()
    views = views_of(method, batch=1)
    image, hidden = views.images[0], views.draws[0][:, 4:]
    before = method.teach(image, hidden)

    def after_changing(patch):
        changed = image.clone()
        row, column = divmod(int(patch), 4)
        changed[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += 1
        different = (method.teach(changed, hidden) - before).abs().amax(-1)[0] > 1e-5
        return different.tolist()

    assert after_changing(hidden[0, 5]) == [False] * 4 + [True] * 4 + [False] * 4
    assert after_changing(views.draws[0][0, 0]) == [False] * 12


@pytest.mark.parametrize(
    ("changes", "teacher_sees", "compared"),
    [
        ({}, (6, 50), 147),  # 3 x 49: with a class token each
        ({"folds": 2}, (4, 74), 146),
        ({"folds": 4}, (8, 37), 144),
        ({"folds": 1}, (2, 148), 147),
        ({"folds": 1, "fold_patches": 36}, (2, 37), 36),
        ({"folds": 1, "fold_patches": 122}, (2, 123), 122),
        (WHOLE, (2, 197), 147),
    ],
)
def test_counts_of_tokens_at_224_px(changes, teacher_sees, compared):
    """49 of 196 visible; the student's decoder always gets all 196 and the class token."""
    recipe = dataclasses.replace(TINY, arch="vit_32x2x2_patch16_224", **changes)
    method = sdae.make(recipe, named(recipe.arch), None)
    seen = {}
    for name, module in (
        ("student", method.student.vit.blocks[0]),
        ("teacher", method.teacher.vit.blocks[0]),
        ("decoder", method.decoder.blocks[0]),
        ("predicted", method.predict),
    ):
        module.register_forward_hook(lambda _, __, output, name=name: seen.update({name: tuple(output.shape)}))
    method(views_of(method, batch=2))
    assert seen == {
        "student": (2, 50, 32),
        "teacher": (*teacher_sees, 32),
        "decoder": (2, 197, 16),
        "predicted": (2, compared, 32),
    }


def test_the_folds_are_drawn_by_the_generator_and_cover_what_is_hidden_once():
    architecture = named("vit_32x2x2_patch16_224")
    rng = np.random.default_rng(3)
    (first,), (again,) = (sdae.draw(TINY, architecture, np.random.default_rng(3)) for _ in range(2))
    assert np.array_equal(first, again)
    firsts = np.zeros(196)
    for _ in range(2000):
        (order,) = sdae.draw(TINY, architecture, rng)
        assert np.array_equal(np.sort(order), np.arange(196))
        firsts[order[49:98]] += 1  # the first fold
    assert np.abs(firsts / 2000 - 0.25).max() < 0.05


@pytest.mark.parametrize("changes", [{}, WHOLE, {"folds": 1, "fold_patches": 1, "cosine": "channels"}])
@pytest.mark.parametrize("start", ["copied", "independent"])
def test_everything_trainable_learns_and_the_teacher_does_not(changes, start):
    method = tiny_method(**changes, teacher_start=start)
    method(views_of(method))["cosine"].backward()
    for name, parameter in method.named_parameters():
        frozen = name.startswith("teacher.") or name == "student.vit.pos_embed"
        assert parameter.requires_grad == (not frozen), name
        if frozen:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_only_the_student_has_stochastic_depth():
    method = tiny_method(drop_path=0.9)
    views = views_of(method)
    assert len({method(views)["cosine"].item() for _ in range(5)}) > 1
    hidden = views.draws[0][:, 4:]
    assert torch.equal(method.teach(views.images[0], hidden), method.teach(views.images[0], hidden))


def test_under_autocast_the_loss_is_nearly_the_same_and_in_float32():
    method = tiny_method()
    exact = method(views_of(method))["cosine"]
    with torch.autocast("cpu", torch.bfloat16):
        rough = method(views_of(method))["cosine"]
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), abs=0.02)


# The teacher.


def test_a_copied_teacher_is_the_student():
    torch.manual_seed(0)
    method = sdae.make(TINY, named(TINY.arch), None)
    for (name, own), other in zip(method.teacher.named_parameters(), method.student.parameters(), strict=True):
        assert torch.equal(own, other), name
        assert own.data_ptr() != other.data_ptr()


def test_an_independent_teacher_is_timms_random_network():
    torch.manual_seed(0)
    recipe = dataclasses.replace(TINY, arch="vit_96x2x2_patch8_48", teacher_start="independent")
    method = sdae.make(recipe, named(recipe.arch), None)
    teacher = method.teacher.vit
    assert teacher.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)  # no sin-cos
    assert teacher.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert teacher.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)  # no xavier
    for (name, own), other in zip(method.teacher.named_parameters(), method.student.named_parameters(), strict=True):
        assert name == other[0]
        assert own.shape == other[1].shape
    for momentum_step in range(1, 4):  # the average takes the positions along
        method.after_step(Progress(momentum_step, 1, 300))
    sincos = sincos_positions(96, 6, prefix=1)
    left = 0.96 * 0.96 * 0.96
    assert (teacher.pos_embed - (1 - left) * sincos).std().item() == pytest.approx(0.02 * left, rel=0.05)


def constant(method):
    """Student all ones, teacher all zeros: what the teacher is afterwards is 1 - the product of the momenta."""
    with torch.no_grad():
        for student, teacher in zip(method.student.parameters(), method.teacher.parameters(), strict=True):
            student.fill_(1.0)
            teacher.fill_(0.0)


def value(method):
    values = {float(x) for p in method.teacher.parameters() for x in (p.min(), p.max())}
    assert max(values) - min(values) < 1e-6
    return max(values)


def test_the_teacher_moves_at_the_end_of_every_epoch_by_the_schedule():
    method = tiny_method()
    constant(method)
    epochs, steps, kept = 10, 3, 1.0
    for step in range(1, epochs * steps + 1):
        method.after_step(Progress(step, steps, epochs))
        if step % steps == 0:
            epoch = step // steps - 1  # 0 for the first
            kept *= 0.99 + 0.5 * (0.96 - 0.99) * (1 + math.cos(math.pi * epoch / epochs))
        assert value(method) == pytest.approx(1 - kept, abs=1e-6)
    assert kept < 0.96 * 0.99


def test_the_teacher_moves_every_step_with_the_momentum_of_the_epoch():
    method = tiny_method(ema="step", momentum=0.9, momentum_end=1.0)
    constant(method)
    kept = 1.0
    for step in range(1, 9):
        method.after_step(Progress(step, 4, 2))
        kept *= 0.9 if step <= 4 else 0.95  # halfway of the cosine in the second of two epochs
        assert value(method) == pytest.approx(1 - kept, abs=1e-6)


def test_what_is_left_of_the_first_teacher():
    """Reference values for the official schedule over 300 epochs: .44 after 20, .13 after 50, .022 after 100, 5e-4."""
    method = tiny_method()
    constant(method)
    left = {}
    for epoch in range(1, 301):
        method.after_step(Progress(7 * epoch, 7, 300))
        left[epoch] = 1 - value(method)
    assert left[20] == pytest.approx(0.44, abs=0.005)
    assert left[50] == pytest.approx(0.13, abs=0.006)
    assert left[100] == pytest.approx(0.022, abs=0.001)
    assert left[300] == pytest.approx(5e-4, abs=1e-4)


def test_a_resumed_method_is_the_same():
    method = tiny_method()
    again = sdae.make(TINY, named(TINY.arch), None)
    again.load_state_dict(method.state_dict())
    views = views_of(method)
    assert again(views)["cosine"].item() == method(views)["cosine"].item()
    assert any(
        not torch.equal(a, b) for a, b in zip(again.teacher.parameters(), again.student.parameters(), strict=True)
    )


def test_watching_writes_what_the_log_wants_and_only_then():
    method = tiny_method()
    views = views_of(method)
    method(views)
    assert method.embedding is None
    assert not method.vitals
    method.watching = True
    method(views)
    pairs = zip(views.images[0], views.draws[0], strict=True)
    with torch.no_grad():
        slow = [slow_encoder(method.student, image, order[:4])[1:].mean(0) for image, order in pairs]
    torch.testing.assert_close(method.embedding, torch.stack(slow), atol=1e-5, rtol=1e-4)
    features = method.teach(views.images[0], views.draws[0][:, 4:]).reshape(-1, 24).numpy()
    assert method.vitals["teacher_std"].item() == pytest.approx(features.std(0, ddof=1).mean(), rel=1e-5)
    assert method.vitals["prediction_std"] > 0
    assert not any(vital.requires_grad for vital in method.vitals.values())


def test_what_is_saved_is_student_and_teacher_and_the_decoder():
    method = tiny_method()
    saved = method.saved()
    assert list(saved.networks) == ["student", "teacher"]  # the first is evaluated (Section 4.4)
    assert saved.networks["student"] is method.student
    assert saved.networks["teacher"] is method.teacher
    assert all(isinstance(network, Backbone) for network in saved.networks.values())
    assert not saved.by_protocol
    state = saved.extras["decoder"]
    assert torch.equal(state["predict.weight"], method.predict.weight)
    assert {key.partition(".")[0] for key in state} == {"tokens", "blocks", "norm", "predict"}


def test_two_processes_are_one(tmp_path):
    check_two_processes(tmp_path, sdae, TINY, tiny_method())


# The recipes: what the sources say, typed again.

FULL = ("image", 1, None, "channels")  # teacher input, folds, patches, cosine: the code's "shrink_num None"
# epochs, warm-up, drop path, momenta, weight decay, teacher's start (appendix A.1; README; issue #3).
_A1 = (300, 60, 0.25, (0.96, 0.99), 0.05, "copied")
_CODE = (300, 60, 0.25, (0.96, 0.99), 0.04, "independent")
_ISSUE = (100, 20, 0.15, (0.9, 0.95), 0.04, "independent")
_OTHER_MOMENTA = {"ema-epoch-0.96": (0.96, 0.99), "ema-step-0.998": (0.998, 0.998), "ema-step-0.999": (0.999, 0.999)}
PUBLISHED = {
    "paper": (_A1, ("folds", 3, None, "fold"), "84.1"),
    "code": (_CODE, ("folds", 3, None, "fold"), ""),
    "100ep": (_ISSUE, ("folds", 3, None, "fold"), "83.5"),
    "800ep": ((800, 160, *_A1[2:]), ("folds", 3, None, "fold"), "84.0"),
    "vit-l": (_A1, ("folds", 3, None, "fold"), "85.7"),
    "cosine-masked": (_A1, ("folds", 3, None, "masked"), ""),
    "cosine-channels": (_A1, ("folds", 3, None, "channels"), ""),
    "full-image-unnormalized": (_A1, FULL, "83.7"),
    "full-image": (_A1, FULL, "84.0"),
    "only-masked": (_A1, ("folds", 1, None, "fold"), "83.5"),
    "crop-36": (_ISSUE, ("folds", 1, 36, "fold"), "82.81"),
    "crop-49": (_ISSUE, ("folds", 1, 49, "fold"), ""),
    "crop-79": (_ISSUE, ("folds", 1, 79, "fold"), ""),
    "crop-122": (_ISSUE, ("folds", 1, 122, "fold"), ""),
    "crop-147": (_ISSUE, ("folds", 1, 147, "fold"), ""),
    "crop-196": (_ISSUE, FULL, "83.04"),
    "folds-2": (_ISSUE, ("folds", 2, None, "fold"), ""),
    "folds-4": (_ISSUE, ("folds", 4, None, "fold"), ""),
    "ema-epoch-0.90": (_ISSUE, FULL, ""),
    "ema-epoch-0.96": (_ISSUE, FULL, ""),
    "ema-step-0.998": (_ISSUE, FULL, ""),
    "ema-step-0.999": (_ISSUE, FULL, ""),
    "decoder-2": (_ISSUE, ("folds", 3, None, "fold"), "82.76"),
    "decoder-4": (_ISSUE, ("folds", 3, None, "fold"), ""),
    "decoder-6": (_ISSUE, ("folds", 3, None, "fold"), ""),
}


def test_the_first_row_is_the_papers_and_no_row_is_unchecked():
    assert next(iter(sdae.RECIPES)) == "paper"
    assert set(sdae.RECIPES) == {*PUBLISHED, "toy"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_what_their_sources_say(name):
    recipe = sdae.RECIPES[name]
    (epochs, warmup, drop_path, momenta, weight_decay, start), seen, published = PUBLISHED[name]
    assert (recipe.epochs, recipe.warmup_epochs, recipe.drop_path) == (epochs, warmup, drop_path)
    assert (recipe.momentum, recipe.momentum_end) == _OTHER_MOMENTA.get(name, momenta)
    assert (recipe.weight_decay, recipe.weight_decay_end, recipe.teacher_start) == (weight_decay, weight_decay, start)
    assert (recipe.teacher_input, recipe.folds, recipe.fold_patches, recipe.cosine) == seen
    assert recipe.ema == ("step" if name.startswith("ema-step") else "epoch")
    assert recipe.normalize_teacher == (name != "full-image-unnormalized")
    assert recipe.arch == ("vit_large_patch16_224" if name == "vit-l" else "vit_base_patch16_224")
    depth = int(name.removeprefix("decoder-")) if name.startswith("decoder-") else 8
    assert (recipe.decoder_depth, recipe.decoder_dim, recipe.decoder_heads) == (depth, 512, 16)
    assert recipe.published.startswith(f"fine-tuning {published}" if published else ("plotted only", "none"))
    # Appendix A.1 and the README: batch 8 x 96, peak 8e-4, AdamW (.9, .95), no clipping.
    assert recipe.batch == 8 * 96
    assert recipe.base_lr == pytest.approx(2.666e-4, rel=1e-3)
    assert recipe.base_lr * recipe.batch / 256 == pytest.approx(8e-4)
    assert (recipe.betas, recipe.min_lr, recipe.horizon, recipe.clip) == ((0.9, 0.95), 0, 1, None)
    assert (recipe.mask_ratio, recipe.augmentation) == (0.75, "mae")
    assert recipe.source


@pytest.mark.parametrize("name", sdae.RECIPES)
def test_every_row_trains(name):
    """At 224 px, since crops of 147 patches need that many, but with a small network."""
    recipe = sdae.RECIPES[name]
    if name != "toy":
        recipe = dataclasses.replace(recipe, arch="vit_16x1x1_patch16_224", decoder_dim=16, decoder_heads=1)
    torch.manual_seed(0)
    method = sdae.make(recipe, named(recipe.arch), None)
    loss = method(some_views(sdae, recipe, batch=1))["cosine"]
    loss.backward()
    assert 0 < loss.item() < 2
    assert all((p.grad is not None) == p.requires_grad for p in method.parameters())


def test_the_loss_falls_when_it_is_minimized():
    method = tiny_method()
    views, losses = views_of(method), []
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(25):
        loss = method(views)["cosine"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio=1: expected a share between 0 and 1"),
        ({"decoder_depth": 0}, "decoder_depth=0"),
        ({"decoder_heads": 0}, "decoder_heads=0"),
        ({"momentum": 1.5}, "momentum=1.5, momentum_end=0.99: expected shares"),
        ({"momentum_end": -0.1}, "momentum_end=-0.1"),
        ({"folds": 0}, "folds=0, fold_patches=None: expected at least 1"),
        ({"fold_patches": 0}, "fold_patches=0"),
        ({"teacher_input": "image"}, "sees the whole image has no folds; set folds=1"),
        ({"teacher_input": "image", "folds": 1, "fold_patches": 49}, "fold_patches=none"),
        ({"batch": 0}, "batch=0"),
    ],
)
def test_impossible_recipes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(sdae.RECIPES["paper"], **change)


@pytest.mark.parametrize("change", [{"fold_patches": 5}, {"folds": 13}, {"folds": 1, "fold_patches": 13}])
def test_more_patches_than_are_hidden_are_refused_when_it_is_made(change):
    with pytest.raises(UserError, match="only 12 patches are hidden, and folds do not overlap"):
        sdae.make(dataclasses.replace(TINY, **change), named(TINY.arch), None)


def test_the_paper_s_2_x_79_does_not_fit():
    recipe = dataclasses.replace(sdae.RECIPES["folds-2"], fold_patches=79)
    with pytest.raises(UserError, match="folds=2, fold_patches=79: only 147 patches"):
        sdae.patches_of_a_fold(recipe, 147)
    assert sdae.patches_of_a_fold(sdae.RECIPES["folds-2"], 147) == 73


def test_views_of_another_kind_are_not_taken_silently():
    method, views = tiny_method(), some_views(sdae, TINY)
    with pytest.raises(ValueError, match="unpack"):
        method(Views(views.images * 2, views.draws))

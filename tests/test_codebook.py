"""MOCA's codebook against loops in float64: what is assigned, when words and temperature move, which words come."""

from __future__ import annotations

import math

import pytest
import torch

from ssl_bench.errors import UserError
from ssl_bench.pretrain.codebook import Codebook, Generator, soft_cross_entropy

SIZE, NEW, DIM = 12, 3, 5


def codebook(sharpness=10.0, seed=0):
    torch.manual_seed(seed)
    return Codebook(SIZE, NEW, DIM, sharpness=sharpness)


def tokens_of(images=4, patches=6, seed=1):
    return torch.randn(2 * images, patches, DIM, generator=torch.Generator().manual_seed(seed))


def unit(row):
    length = math.sqrt(sum(x * x for x in row))
    return [x / length for x in row]


def assigned(tokens, words, sharpness, spread):
    """Assignments, and max minus mean cosine of every token, one number at a time."""
    assignments, spreads = [], []
    for token in tokens.double().tolist():
        cosines = [sum(a * b for a, b in zip(unit(token), unit(word), strict=True)) for word in words.double().tolist()]
        powers = [math.exp(sharpness * cosine / spread) for cosine in cosines]
        assignments.append([power / sum(powers) for power in powers])
        spreads.append(max(cosines) - sum(cosines) / len(cosines))
    return torch.tensor(assignments, dtype=torch.float64), spreads


def drawn_of(views, patches):
    return torch.tensor([views, patches]).T


def test_the_first_words_are_non_negative_random_unit_vectors():
    torch.manual_seed(0)
    words = Codebook(4096, 4, 64, sharpness=10.0).words
    assert words.shape == (4096, 64)
    assert (words >= 0).all()
    assert torch.allclose(words.norm(dim=1), torch.ones(4096))
    assert 0.45 < (words == 0).float().mean() < 0.55  # the negative half of a normal distribution
    assert words.std(0).min() > 0.05


@pytest.mark.parametrize("sharpness", [10.0, 4.0])
def test_assignments_are_a_softmax_of_cosines_over_the_running_spread(sharpness):
    book, tokens = codebook(sharpness), tokens_of()
    expected, _ = assigned(tokens.flatten(0, 1), book.words, sharpness, 0.5)
    got = book(3.7 * tokens)  # lengths do not count
    assert got.dtype == torch.float32
    assert torch.allclose(got.double().flatten(0, 1), expected, atol=1e-6)
    book.spread.fill_(0.2)
    sharper, _ = assigned(tokens.flatten(0, 1), book.words, sharpness, 0.2)
    assert torch.allclose(book(tokens).double().flatten(0, 1), sharper, atol=1e-6)


def test_under_autocast_assignments_keep_float32():
    book, tokens = codebook(), tokens_of()
    expected = book(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(book(tokens), expected)


def test_large_similarities_do_not_overflow():
    assignments = codebook(sharpness=10000.0)(tokens_of())
    assert torch.isfinite(assignments).all()
    assert torch.allclose(assignments.sum(-1), torch.ones(8, 6))


def test_a_step_sees_words_and_temperature_of_the_last_one():
    book, tokens = codebook(), tokens_of()
    before, spread = book.words.clone(), book.spread.clone()
    first = book(tokens)
    book.take(tokens, drawn_of([0, 0, 0, 0], [0, 1, 2, 3]))
    assert torch.equal(book(tokens), first)  # the second part of a step
    assert torch.equal(book.words, before)
    assert torch.equal(book.spread, spread)
    book.commit()
    assert not torch.equal(book(tokens), first)


def test_the_temperature_moves_once_for_each_view():
    book, tokens = codebook(), tokens_of()
    tokens[:4] = 0.1 * tokens[:4] + book.words[0]  # the views must differ
    _, spreads = assigned(tokens.flatten(0, 1), book.words, 1.0, 1.0)
    one, other = sum(spreads[:24]) / 24, sum(spreads[24:]) / 24
    assert abs(one - other) > 0.05
    book(tokens)
    book.take(tokens, drawn_of([0] * 4, [0] * 4))
    book.commit()
    assert float(book.spread) == pytest.approx(0.99 * (0.99 * 0.5 + 0.01 * one) + 0.01 * other, abs=1e-7)


def test_parts_of_a_step_are_averaged_and_the_first_gives_the_words():
    whole, parts = codebook(), codebook()
    tokens = tokens_of(images=6)
    drawn = drawn_of([1, 0, 1, 0, 1, 0], [5, 4, 3, 2, 1, 0])
    whole(tokens)
    whole.take(tokens, drawn)
    for part in (slice(0, 3), slice(3, 6)):
        some = torch.cat([tokens[:6][part], tokens[6:][part]])
        parts(some)
        parts.take(some, drawn[part])
    whole.commit()
    parts.commit()
    assert torch.equal(whole.words, parts.words)
    assert torch.allclose(whole.spread, parts.spread)


@pytest.mark.parametrize("view", [0, 1])
def test_new_words_are_the_drawn_tokens_of_the_first_images_in_the_first_images_view(view):
    book, tokens = codebook(), tokens_of()
    before = book.words.clone()
    book(tokens)
    book.take(tokens, drawn_of([view, 1 - view, 1 - view, view], [5, 0, 2, 4]))
    book.commit()
    for row, (image, patch) in enumerate([(0, 5), (1, 0), (2, 2)]):
        expected = torch.tensor(unit(tokens[4 * view + image, patch].tolist()))
        assert torch.allclose(book.words[row], expected, atol=1e-6)
    assert torch.equal(book.words[3:], before[3:])


def test_the_oldest_words_go_first_and_the_queue_turns_around():
    book = codebook()
    steps = [tokens_of(seed=10 + step) for step in range(6)]  # the queue holds four steps of three words
    for tokens in steps:
        book(tokens)
        book.take(tokens, drawn_of([0] * 4, [0] * 4))
        book.commit()
    newest = {0: 4, 1: 5, 2: 2, 3: 3}  # which step is where
    for place, step in newest.items():
        expected = torch.stack([torch.tensor(unit(steps[step][image, 0].tolist())) for image in range(3)])
        assert torch.allclose(book.words[3 * place : 3 * place + 3], expected, atol=1e-6)
    assert int(book.oldest) == 6


def test_a_state_dict_restores_queue_and_temperature():
    book, other = codebook(), codebook(seed=9)
    for seed in range(2):
        book(tokens_of(seed=seed))
        book.take(tokens_of(seed=seed), drawn_of([0] * 4, [0] * 4))
        book.commit()
    other.load_state_dict(book.state_dict())
    for each in (book, other):
        each(tokens_of(seed=5))
        each.take(tokens_of(seed=5), drawn_of([1] * 4, [0] * 4))
        each.commit()
    assert torch.equal(book.words, other.words)
    assert torch.equal(book.spread, other.spread)


def test_too_few_images_for_the_words_of_a_step():
    book, tokens = codebook(), tokens_of(images=2)
    with pytest.raises(UserError, match=r"new_words=3, but a process sees only 2 images.*--set new_words"):
        book.take(tokens, drawn_of([0, 0], [0, 0]))


def product(matrix, vector):
    return [sum(w * x for w, x in zip(row, vector, strict=True)) for row in matrix.double().tolist()]


def generated(generator, words):
    """Appendix C.1, one word and one channel at a time, in float64."""
    first, norm, _, second = generator.layers
    weights, biases = norm.weight.tolist(), norm.bias.tolist()
    hidden = [product(first.weight, unit(word)) for word in words.double().tolist()]
    rows = []
    for word, values in zip(words.double().tolist(), hidden, strict=True):
        active = []
        for channel, value in enumerate(values):
            column = [each[channel] for each in hidden]
            mean = sum(column) / len(column)
            variance = sum((x - mean) ** 2 for x in column) / len(column)
            scaled = (value - mean) / math.sqrt(variance + 1e-5) * weights[channel] + biases[channel]
            active.append(max(scaled, 0.0))
        out = product(second.weight, active)
        out = [y + bias for y, bias in zip(out, second.bias.double().tolist(), strict=True)]
        if isinstance(generator.skip, torch.nn.Linear):
            assert generator.skip.bias is None
            out = [y + x for y, x in zip(out, product(generator.skip.weight, unit(word)), strict=True)]
        elif generator.skip is not None:
            out = [y + x for y, x in zip(out, unit(word), strict=True)]
        rows.append(unit(out))
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("out_dim", [DIM, 3])
def test_prototypes_are_those_of_the_appendix(residual, out_dim):
    torch.manual_seed(0)
    generator = Generator(DIM, out_dim, residual=residual)
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    words = 2.0 * codebook().words  # normalized in the generator
    expected = generated(generator, words)
    assert torch.allclose(generator(words).double(), expected, atol=1e-5)
    assert torch.allclose(generator.eval()(words).double(), expected, atol=1e-5)  # no running means
    shapes = [tuple(parameter.shape) for parameter in generator.parameters()]
    linear = [(2 * DIM, DIM), (2 * DIM,), (2 * DIM,), (out_dim, 2 * DIM), (out_dim,)]
    assert shapes == linear + ([(out_dim, DIM)] if residual and out_dim != DIM else [])


def test_soft_cross_entropy_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(7, 11, generator=generator)).requires_grad_()
    target = torch.rand(7, 11, generator=generator)
    target /= target.sum(1, keepdim=True)
    precise = logits.detach().double().requires_grad_()
    expected = 0.0
    for row in range(7):
        total = torch.exp(precise[row]).sum()
        for k in range(11):
            expected = expected - float(target[row, k]) * torch.log(torch.exp(precise[row, k]) / total) / 7
    (2.5 * expected).backward()
    loss = soft_cross_entropy(logits, target)
    (2.5 * loss).backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(logits.grad.double(), precise.grad, atol=1e-6)


def test_soft_cross_entropy_of_half_precision_logits_is_computed_in_float32():
    logits = (8 * torch.randn(64, 50, generator=torch.Generator().manual_seed(0))).bfloat16().requires_grad_()
    target = torch.rand(64, 50, generator=torch.Generator().manual_seed(1)).softmax(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = soft_cross_entropy(logits, target)
    expected = -(target.double() * logits.detach().double().log_softmax(1)).sum(1).mean()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16
    assert torch.allclose(logits.grad.double(), (logits.double().softmax(1) - target) / 64, atol=1e-2 / 64)

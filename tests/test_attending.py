"""Attention of packed rows, written out, equals the formula: values, gradients, and what stays in its row."""

from __future__ import annotations

import weakref

import pytest
import torch
from families import make
from torch import Tensor
from torch.nn import functional as F

from onebase import Base
from onebase.anatomy import attention
from onebase.anatomy.attention import is_plain
from onebase.core import attending
from onebase.core.attending import attend_packed
from onebase.core.packing import CHUNK_ROWS, Packing, make_packing

HEADS, WIDTH = 3, 4
LENGTHS = [*([2] * CHUNK_ROWS), 3, 1, 7, 7, 5]  # a chunk without padding, and one with


def packing_of(lengths: list[int], multiple: int = 1) -> Packing:
    """Pack right-padded rows."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    packing = make_packing(mask, always=True, multiple=multiple)
    assert packing is not None
    return packing


def draw(dtype: torch.dtype) -> list[Tensor]:
    """Return query, key and value, (1, heads, n, width)."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, HEADS, sum(LENGTHS), WIDTH)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def by_row(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Tensor:
    """Return (1, n, heads, width), each row by itself."""
    found, start = [], 0
    for length in LENGTHS:
        q, k, v = (part[0, :, start : start + length] for part in (query, key, value))
        scores = scale * q @ k.mT
        if causal:
            scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), float("-inf"))
        found.append((scores.softmax(-1) @ v).transpose(0, 1))
        start += length
    return torch.cat(found)[None]


@pytest.mark.parametrize("causal", [False, True])
def test_values_and_gradients_are_those_of_each_row_alone(causal) -> None:
    parts = draw(torch.float64)
    weights = torch.randn(1, sum(LENGTHS), HEADS, WIDTH, dtype=torch.float64)
    found = attend_packed(*parts, packing_of(LENGTHS), causal, 0.7)
    expected = by_row(*parts, causal, 0.7)
    assert torch.allclose(found, expected, atol=1e-12)
    one = torch.autograd.grad((found * weights).sum(), parts)
    other = torch.autograd.grad((expected * weights).sum(), parts)
    for a, b in zip(one, other):
        assert torch.allclose(a, b, atol=1e-12) and float(b.abs().max()) > 0.1


def test_bfloat16_is_as_near_to_the_true_value_as_single_operations() -> None:
    exact = [part.detach().double() for part in draw(torch.bfloat16)]
    true = by_row(*exact, False, 0.5)
    found = attend_packed(*draw(torch.bfloat16), packing_of(LENGTHS), False, 0.5)
    composed = by_row(*draw(torch.bfloat16), False, 0.5)
    assert found.dtype == torch.bfloat16
    assert (found - true).abs().mean() <= 1.05 * (composed - true).abs().mean() < 1e-2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(value) -> None:
    """Forward and backward: a row's places share products with other rows, and its padding repeats it."""
    parts = draw(torch.float32)
    bad = len(LENGTHS) - 4  # the row of one token, beside longer ones
    place = sum(LENGTHS[:bad])
    for part in parts:
        part.data[0, :, place] = value
    out = attend_packed(*parts, packing_of(LENGTHS), False, 0.5)
    grads = torch.autograd.grad(out.sum(), parts)
    others = [i for i in range(sum(LENGTHS)) if i != place]
    assert not out[0, place].isfinite().all()
    assert out[0, others].isfinite().all() and all(grad[0, :, others].isfinite().all() for grad in grads)


def capped(module, query, key, value, mask, scaling, **_):
    """Eager attention with a soft cap on the scores, as Gemma 2 has it."""
    scores = 30 * torch.tanh(scaling * query @ key.mT / 30) + mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def test_functions_that_do_more_are_found_out(tokenizer, monkeypatch) -> None:
    """A BERT computes the formula; a soft cap, a bias, repeated heads and tensors beside it do not."""
    with Base(make("bert", "eager"), tokenizer) as base:
        module = base.model.get_submodule("encoder.layer.0.attention.self")
        q = torch.zeros(1, 2, 3, 8)
        assert is_plain(module, q, q, {"scaling": 0.3, "dropout": 0.0})
        assert not is_plain(module, q, q, {"scaling": 0.3, "position_bias": torch.zeros(1)})
        assert not is_plain(module, q, q[:, :1], {"scaling": 0.3})
        assert is_plain(module, q, q, {"scaling": 0.3, "dropout": 0.5})  # off, as the base does not train
        module.train()
        assert not is_plain(module, q, q, {"scaling": 0.3, "dropout": 0.5})
        module.eval()
        monkeypatch.setattr(attention, "own_function", lambda _: capped)
        monkeypatch.setattr(attention, "_PLAIN", weakref.WeakKeyDictionary())
        assert not is_plain(module, q, q, {"scaling": 0.3})


@pytest.mark.parametrize("causal", [False, True])
def test_extra_tokens_get_nothing_and_give_nothing(causal) -> None:
    packing, count = packing_of(LENGTHS, 32), sum(LENGTHS)
    assert packing.tokens == 64 and packing.extra == 64 - count and sum(packing.lengths) == 64
    parts = draw(torch.float64)
    longer = [torch.cat([part, part.new_full((1, HEADS, packing.extra, WIDTH), 3.0)], 2) for part in parts]
    weights = torch.randn(1, 64, HEADS, WIDTH, dtype=torch.float64)
    found = attend_packed(*longer, packing, causal, 0.7)  # type: ignore[arg-type]
    expected = by_row(*parts, causal, 0.7)
    assert torch.allclose(found[:, :count], expected, atol=1e-12) and not found[:, count:].any()
    one = torch.autograd.grad((found * weights).sum(), longer)
    other = torch.autograd.grad((expected * weights[:, :count]).sum(), parts)
    for a, b in zip(one, other):
        assert torch.allclose(a[:, :, :count], b, atol=1e-12) and not a[:, :, count:].any()


def test_chunks_end_where_rows_become_of_another_kind() -> None:
    mask = torch.arange(30) < torch.tensor([9, 9, 9, 9, 9, 9, 10, 10, 10, 10, 10, 30, 30])[:, None]
    cuts = [(0, 3), (3, 6), (6, 11), (11, 13)]  # other prefixes, and a length beyond what half a chunk has
    packing = make_packing(mask, kinds=[0, 0, 0, 5, 5, 5, 0, 0, 0, 0, 0, 0, 0])
    assert packing is not None and [chunk.rows for chunk in packing.chunks] == cuts
    assert all(chunk.real is None for chunk in packing.chunks)  # so no mask is needed
    plain = make_packing(mask)
    assert plain is not None and [chunk.rows for chunk in plain.chunks] == [(0, 8), (8, 13)]


def test_extra_tokens_are_copies_that_nobody_reads() -> None:
    packing = packing_of(LENGTHS, 32)
    values = torch.arange(1.0, 1 + len(LENGTHS) * max(LENGTHS)).reshape(len(LENGTHS), -1)
    packed = packing.pack(values)
    last = float(values[-1, LENGTHS[-1] - 1])
    assert packed.shape == (1, 64) and set(packed[0, sum(LENGTHS) - 1 :].tolist()) == {last}
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    assert torch.equal(packing.unpack(packed), values * mask)
    assert all(chunk.mask.shape[1] % 4 == 0 for chunk in packing.chunks if chunk.real is not None)
    rows = torch.tensor([0, len(LENGTHS) - 1])
    assert packing.of_rows(rows).tolist() == [0, 1, *range(sum(LENGTHS[:-1]), 64)]


def test_training_uses_it_and_equals_the_modelling_file(tokenizer, monkeypatch) -> None:
    seen: list[int] = []
    original = attending.PackedAttention.apply

    def apply(*args):
        seen.append(len(args[0]))
        return original(*args)

    with Base(make("bert", "eager").double(), tokenizer) as base:
        adapter = base.add("a", "lora(rank=2)")
        adapter.module.double()
        for parameter in adapter.module.parameters():
            parameter.data += 0.1
        real = torch.arange(9) < torch.tensor([9, 4, 6, 3])[:, None]
        ids = torch.randint(4, 40, (4, 9), generator=torch.Generator().manual_seed(0)).masked_fill(~real, 1)
        batch = {"input_ids": ids, "attention_mask": real.long()}
        with monkeypatch.context() as patch:
            patch.setattr(attending.PackedAttention, "apply", apply)
            found = base.states(batch, "a")
        with base.use("a"):
            expected = base.model(**batch).last_hidden_state
        assert len(seen) == base.anatomy.layers and set(seen) == {32}  # 22, and the extra ones
        assert torch.allclose(found[real], expected[real], atol=1e-10)
        one = torch.autograd.grad(found[real].square().sum(), list(adapter.parameters()))
        other = torch.autograd.grad(expected[real].square().sum(), list(adapter.parameters()))
        assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(one, other))


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("masked", ["", "each its own", "all the same"])
def test_attention_of_whole_rows_is_that_of_the_fused_function(monkeypatch, dtype, near, masked) -> None:
    """Cut into calls of two rows, the last one shorter; columns in front of the tokens are a prefix's."""
    b, t, s = 5, 20, 23
    monkeypatch.setattr(attending, "SCORES", 2 * HEADS * t * s)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(b, HEADS, n, WIDTH, generator=generator).to(dtype) for n in (t, s, s))
    lengths = {"": None, "each its own": [s, 4, 9, 1, 17], "all the same": [9]}[masked]
    seen = None if lengths is None else torch.arange(s) < torch.tensor(lengths)[:, None, None, None]
    found = attending.attend(q, k, v, seen, 0.6)
    expected = F.scaled_dot_product_attention(q, k, v, seen, scale=0.6).transpose(1, 2)
    assert found.shape == expected.shape and (found - expected).abs().max() <= near


def test_a_call_that_is_more_than_the_formula_goes_to_the_original() -> None:
    """Causal ones, biases, additive masks, rows that see nothing, and base dropout."""
    module = make("bert").encoder.layer[0].attention.self
    seen = torch.ones(2, 1, 4, 4, dtype=torch.bool)
    assert attention._is_plain_call(module, None, {}) and attention._is_plain_call(module, seen, {})
    nothing = seen.clone()
    nothing[1, 0, 2] = False
    for mask, kw in (
        (None, {"is_causal": True}), (None, {"position_bias": seen}), (seen, {"softcap": 3.0}),
        (seen, {"dropout": 0.1}), (seen.float(), {}), (nothing, {}),
    ):  # fmt: skip
        assert not attention._is_plain_call(module, mask, kw)


def test_a_predicted_batch_is_computed_so_and_equals_the_model_alone(monkeypatch) -> None:
    """Rows of one length, which are not packed."""
    calls = []
    attend = attending.attend
    monkeypatch.setattr(attention, "attend", lambda *args: calls.append(1) or attend(*args))
    model = make("bert").eval()
    batch = {"input_ids": torch.arange(40).reshape(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
    with Base(model, None) as base, torch.no_grad():
        found = base.states(batch, None)
    assert len(calls) == model.config.num_hidden_layers
    assert torch.allclose(found, expected, atol=1e-6)

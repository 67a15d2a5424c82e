"""What a route accepts and refuses, and what callers get back under virtual tokens: their own T positions."""

from __future__ import annotations

import checks
import pytest
import torch
from families import CASES, FAMILIES, listed, make
from methods import every

from onebase.base import Base
from onebase.core.contracts import PromptDelta
from onebase.errors import ConfigError, RouteError, UnsupportedError

# an encoder-decoder's prompt counts among the positions of its encoder, not of what is written
CONTINUES = [name for name, case in CASES.items() if case.positions and case.writes and name != "bart"]
PROMPTED = [name for name, case in CASES.items() if case.positions]
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_wrong_numbers_of_rows_raise(family, tokenizer):
    """A list must name every row: never fewer, more, or a guess from a multiple."""
    with Base(make(family), tokenizer) as base:
        base.add("a", "lora")
        for names in (["a"], ["a", None, "a"], ["a"] * 4, []):
            with base.use(names), pytest.raises(RouteError, match=f"2 rows but the route names {len(names)}"):
                base.model(**checks.inputs(base, IDS))
        with pytest.raises(RouteError, match="2 rows but the route names 3"):
            base.model(**checks.inputs(base, IDS), adapter_ids=base.ids(["a", None, "a"]))
        with base.use(["a"], repeat=3), pytest.raises(RouteError, match="or 3 with the stated factor 3"):
            base.model(**checks.inputs(base, IDS))
        with pytest.raises(RouteError, match="no adapter has number 7"):
            base.model(**checks.inputs(base, IDS), adapter_ids=torch.tensor([7, -1]))
        with pytest.raises(ConfigError, match="repeat"), base.use(["a"], repeat=0):
            pass


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stated_factor_repeats_each_entry(family, tokenizer):
    """`use(names, repeat=k)` covers rows i*k to i*k+k-1 with entry i."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        names = [*checks.attach(base, every())[::4], None]
        row = checks.draw([None]).tokens[0]
        batch = checks.inputs(base, row.expand(3 * len(names), -1))
        with base.use(names, repeat=3):
            out = checks.values(base.model(**batch))
        for i, name in enumerate(names):
            for k in range(3):
                assert checks.gap(out[3 * i + k], checks.call_alone(base, row, name)) <= checks.LOGITS


def test_the_inner_route_wins_and_the_outer_returns(tokenizer):
    """Nested `use`: innermost decides, also for the plain base; explicit ids beat both."""
    with Base(make("gpt2"), tokenizer) as base, torch.no_grad():
        names = checks.attach(base, {n: every()[n] for n in ("lora-0", "prompt-0", "prefix-0")})
        row = checks.draw([None]).tokens[0]
        alone = {name: checks.call_alone(base, row, name) for name in (*names, None)}

        def now():
            return checks.values(base.model(**checks.inputs(base, row[None])))[0]

        bare = now()
        with base.use(names[0]):
            assert torch.equal(now(), alone[names[0]])
            with base.use([names[1]]):
                assert torch.equal(now(), alone[names[1]])
                with base.use(None):
                    assert torch.equal(now(), alone[None])
                call = checks.inputs(base, row[None])
                found = checks.values(base.model(**call, adapter_ids=base.ids([names[2]])))[0]
                assert torch.equal(found, alone[names[2]])
                assert torch.equal(now(), alone[names[1]])
            with pytest.raises(ZeroDivisionError), base.use(names[2]):
                _ = 1 / 0
            assert torch.equal(now(), alone[names[0]])
        assert torch.equal(now(), bare)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", *listed(["mistral", "phi3", "gpt-neox", "olmo2"])])
def test_packing_with_prefixes_prompts_or_lists_raises(family, tokenizer):
    """Several sequences in a row have one route: refused where that cannot be right, served where it is."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        checks.attach(base, {n: every()[n] for n in ("lora-0", "lora-1", "bottleneck-0", "prompt-0", "prefix-0")})
        packed = {"input_ids": IDS.reshape(1, 8), "position_ids": torch.arange(4).repeat(2)[None], "use_cache": False}
        marked = {**packed, "cu_seq_lens_q": torch.tensor([0, 4, 8], dtype=torch.int32)}
        for name in ("prompt-0", "prefix-0"):
            for call in (packed, marked):
                with base.use(name), pytest.raises(RouteError, match="packed"):
                    base.model(**call)
        twice = {k: v.repeat(2, 1) if isinstance(v, torch.Tensor) else v for k, v in packed.items()}
        with base.use(["lora-0", "lora-1"]), pytest.raises(RouteError, match="packed"):
            base.model(**twice)
        for name in ("lora-0", "bottleneck-0"):
            with base.use(name):
                out = base.model(**packed).logits[0]
            for i, piece in enumerate(IDS):
                assert checks.gap(out[4 * i : 4 * i + 4], checks.call_alone(base, piece, name)) <= checks.LOGITS


@pytest.mark.parametrize("family", listed(PROMPTED))
def test_too_many_positions_raise_with_the_numbers(family, tokenizer):
    """Text and virtual tokens together must fit the learned positions; exactly fitting is fine."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        base.add("a", "prompt(length=4, init='uniform')")
        limit = CASES[family].positions
        ids = torch.full((1, limit - 3), 9)
        with base.use("a"), pytest.raises(UnsupportedError, match=rf"{limit + 1} tokens.*exceed the {limit} positions"):
            base.model(**checks.inputs(base, ids))
        written = checks.DECODED if base.is_encoder_decoder else limit - 4
        assert checks.call_alone(base, ids[0, 1:], "a").shape[0] == written


@pytest.mark.parametrize("family", listed(CONTINUES))
def test_generating_beyond_the_positions_raises_with_the_numbers(family, tokenizer):
    """A step of generation that has no position left says so."""
    with Base(make(family), tokenizer) as base:
        base.add("a", "prompt(length=4, init='uniform')")
        limit = CASES[family].positions
        with pytest.raises(UnsupportedError, match=rf"{limit + 1} tokens.*exceed the {limit} positions"):
            base.generate([[9] * (limit - 6)], "a", max_new_tokens=8, min_new_tokens=8, return_ids=True)


def rows_of(output, i, real, seq2seq):
    """Pick what belongs to row i of every output that has a token axis, as name -> list of tensors."""
    found = {}
    prefix = "decoder_" if seq2seq else ""
    states = output[f"{prefix}hidden_states"]
    found["hidden_states"] = [s[i] if seq2seq else s[i, real] for s in states]
    weights = output.get(f"{prefix}attentions")
    if weights is not None:
        found["attentions"] = [a[i] if seq2seq else a[i][:, real][:, :, real] for a in weights]
    return found


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_attentions_have_the_callers_positions(family, side, tokenizer):
    """Hidden states of every layer and attention weights come back with T positions and equal the row alone."""
    with Base(make(family, "eager"), tokenizer) as base, torch.no_grad():
        names = [*checks.attach(base, every()), None]
        rows = checks.draw(names)
        ids, mask = rows.padded(side)
        first = torch.stack([row[: checks.DECODED] for row in rows.tokens])
        more = {"output_hidden_states": True, "output_attentions": True}
        with base.use(names):
            out = base.model(**checks.inputs(base, ids, mask, first), **more)
        width = checks.DECODED if base.is_encoder_decoder else ids.shape[1]
        kind = "decoder_" if base.is_encoder_decoder else ""
        assert all(s.shape[1] == width for s in out[f"{kind}hidden_states"])
        assert all(a.shape[2:] == (width, width) for a in out[f"{kind}attentions"])
        for i, (row, name) in enumerate(zip(rows.tokens, names)):
            with base.use(name):
                alone = base.model(**checks.inputs(base, row[None]), **more)
            mixed = rows_of(out, i, mask[i].bool(), base.is_encoder_decoder)
            single = rows_of(alone, 0, torch.ones(len(row), dtype=torch.bool), base.is_encoder_decoder)
            for key in single:  # states between layers: T5's are large, and no norm has made them alike
                for a, b in zip(mixed[key], single[key], strict=True):
                    assert checks.gap(a, b) <= 2 * checks.LOGITS, (name, key)


@pytest.mark.parametrize("family", ["t5", "t5-gated", *listed(["mt5", "bart"])])
def test_encoder_states_can_be_handed_back_under_the_same_route(family, tokenizer):
    """An encoder's states keep the virtual tokens for its decoder: they serve again, but under no other route."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        names = [*checks.attach(base, every()), None]
        rows = checks.draw(names)
        ids, mask = rows.padded("right")
        first = torch.stack([row[: checks.DECODED] for row in rows.tokens])
        with base.use(names):
            out = base.model(**checks.inputs(base, ids, mask, first))
            longest = max(len(d.tokens()) for a in base.adapters.values() for d in prompts_of(a))
            assert out.encoder_last_hidden_state.shape[1] == ids.shape[1] + longest
            again = {"encoder_outputs": (out.encoder_last_hidden_state,), "attention_mask": mask}
            assert torch.equal(base.model(**again, decoder_input_ids=first).logits, out.logits)
        with base.use("prompt-0"), pytest.raises(RouteError, match="same route"):
            base.model(**again, decoder_input_ids=first)
        read = base.states({"input_ids": ids, "attention_mask": mask}, names)  # an encoder that is read alone: T
        assert read.shape[1] == ids.shape[1]


def prompts_of(adapter):
    """Return the deltas of an adapter that hold virtual tokens."""
    return [delta for _, delta in adapter.module.items() if isinstance(delta, PromptDelta)]


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "camembert", *listed(["albert", "mpnet"])])
def test_the_pooler_reads_the_callers_first_token(family, tokenizer):
    """`pooler_output` under virtual tokens equals the row alone, and its state is the first text token's."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        names = [*checks.attach(base, every()), None]
        rows = checks.draw(names)
        ids, mask = rows.padded("right")
        with base.use(names):
            out = base.model(input_ids=ids, attention_mask=mask)
        pooler = base.model.pooler
        if family == "albert":  # a linear map of the first state; the activation is beside it
            expected = torch.tanh(pooler(out.last_hidden_state[:, 0]))
        else:
            expected = pooler(out.last_hidden_state)
        assert torch.allclose(out.pooler_output, expected, atol=checks.LOGITS)
        for i, (row, name) in enumerate(zip(rows.tokens, names)):
            with base.use(name):
                alone = base.model(input_ids=row[None]).pooler_output[0]
            assert checks.gap(out.pooler_output[i], alone) <= checks.LOGITS


@pytest.mark.parametrize("family", FAMILIES)
def test_tuples_are_what_named_outputs_are(family, tokenizer):
    """`return_dict=False` gives the same tensors as the named output."""
    with Base(make(family, "eager"), tokenizer) as base, torch.no_grad():
        names = [*checks.attach(base, every()), None]
        rows = checks.draw(names)
        ids, mask = rows.padded("left")
        call = checks.inputs(base, ids, mask, torch.stack([row[: checks.DECODED] for row in rows.tokens]))
        with base.use(names):
            named = base.model(**call, output_hidden_states=True).to_tuple()
            plain = base.model(**call, output_hidden_states=True, return_dict=False)
        assert len(named) == len(plain)
        for one, other in zip(named, plain):
            pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
            assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_as_embeddings_are_routed_alike(family, tokenizer):
    """A call with `inputs_embeds` gives what the call with ids gives."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        blind = {n: m for n, m in every().items() if not m.vocabulary()}  # trained tokens need ids
        names = [*checks.attach(base, blind), None]
        rows = checks.draw(names)
        ids, mask = rows.padded("right")
        call = checks.inputs(base, ids, mask, torch.stack([row[: checks.DECODED] for row in rows.tokens]))
        with base.use(names):
            expected = checks.values(base.model(**call))
            call["inputs_embeds"] = base.anatomy.stacks[0].embed(call.pop("input_ids"))
            found = checks.values(base.model(**call))
        real = slice(None) if base.is_encoder_decoder else mask.bool()
        assert checks.gap(found[real], expected[real]) <= checks.LOGITS

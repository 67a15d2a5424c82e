"""A call that raises leaves nothing behind: the next plain call is the base, the next routed call is right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import checks
import pytest
import torch
from families import FAMILIES, make
from methods import every

from onebase import LoRA
from onebase.base import Base
from onebase.errors import ConfigError, RouteError
from onebase.extend import AdapterModule, Delta, Method


class Failing(Delta):
    """Raises what it was told to."""

    def __init__(self, error: type[BaseException]):
        super().__init__()
        self.error = error
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, h, at):
        """Raise."""
        raise self.error("on purpose")


@dataclass(frozen=True, kw_only=True)
class Faulty(Method):
    """A method that fails in the last layer, when other adapters have been applied already."""

    name: ClassVar[str] = "faulty"
    error: type[BaseException] = ValueError

    def select(self, sites):
        """Return the last exit."""
        return [site for site in sites if site.kind == "exit"][-1:]

    def build(self, sites, init):
        """Build the failing delta."""
        return AdapterModule({site.name: Failing(self.error) for site in sites})


def answer(call):
    """Return what a call gives; a KeyboardInterrupt out of it fails the test instead of ending the session."""
    try:
        return call()
    except KeyboardInterrupt:
        pytest.fail("an adapter of an earlier call was applied")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_raising_delta_leaks_nothing(family, error, tokenizer):
    """After an exception in a mixed forward, also Ctrl-C: outputs bitwise as before, plain and routed."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        names = checks.attach(base, every())
        rows = checks.draw([*names, None, "faulty"])
        row = rows.tokens[-1]
        base.add("faulty", Faulty(error=error))
        before = {name: checks.call_alone(base, row, name) for name in (*names, None)}
        plain = checks.values(base.model(**checks.inputs(base, row[None])))
        hooks = checks.hook_count(base.model)
        state = checks.snapshot(base.model)
        for by_ids in (False, True):
            with pytest.raises(error, match="on purpose"):
                checks.call_rows(base, rows, "left", by_ids=by_ids)
            assert torch.equal(plain, checks.values(base.model(**checks.inputs(base, row[None]))))
            with pytest.raises(error, match="on purpose"):
                checks.call_rows(base, rows, "left", by_ids=by_ids)
            for name, expected in before.items():
                assert torch.equal(checks.call_alone(base, row, name), expected)
        assert checks.hook_count(base.model) == hooks
        assert checks.differences(state, checks.snapshot(base.model)) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_an_interrupted_call_by_ids_does_not_route_the_next(family, error, tokenizer):
    """`adapter_ids` of a call that was interrupted are gone, also where only a part of the model is called next."""
    with Base(make(family), tokenizer) as base, torch.no_grad():
        names = checks.attach(base, every())
        base.add("faulty", Faulty(error=error))
        ids, mask = checks.draw([None] * 3).padded("right")
        batch = {"input_ids": ids, "attention_mask": mask}
        plain, routed = base.states(batch, None), base.states(batch, names[0])
        stack = base.anatomy.stacks[0].module
        bare = stack(**batch).last_hidden_state
        for after, expected in (
            (lambda: base.states(batch, names[0]), routed),
            (lambda: base.states(batch, None), plain),
            (lambda: stack(**batch).last_hidden_state, bare),
        ):
            with pytest.raises(error, match="on purpose"):
                base.model(**checks.inputs(base, ids, mask), adapter_ids=base.ids(["faulty"] * 3))
            assert torch.equal(answer(after), expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_recomputation_leaks_nothing(error, tokenizer):
    """A backward pass that raises while a checkpointed layer is computed again leaves no plan behind."""
    with Base(make("bert"), tokenizer) as base:
        names = checks.attach(base, every())
        row = checks.draw([None]).tokens[0]
        plain = checks.values(base.model(input_ids=row[None]))
        base.gradient_checkpointing(True)
        out = checks.call_alone(base, row, names[0])
        module = base.anatomy.sites["encoder/0/attention/q"].module

        def fail(*_):
            raise error("on purpose")

        handle = module.register_forward_hook(fail)
        with pytest.raises(error, match="on purpose"):
            out.sum().backward()
        handle.remove()
        assert not base._installed.runtime.inside
        assert torch.equal(plain, checks.values(base.model(input_ids=row[None])))


@dataclass(frozen=True, kw_only=True)
class Nowhere(Method):
    """A method that finds nothing to change."""

    name: ClassVar[str] = "nowhere"

    def select(self, sites):
        """Return no site."""
        return []

    def build(self, sites, init):
        """Build nothing."""
        return AdapterModule({})


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"name": "lora", "rank": 4}, "has rank: expected a name and settings"),
        ({"settings": {"rank": 4}}, "expected a name and settings"),
        ({}, "expected a name and settings"),
        ({"name": "lora", "settings": [4]}, "expected a name and settings"),
        (5, "method = 5"),
        (None, "method = None"),
        (LoRA, r"pass one of it, LoRA\(\)"),
        (Nowhere(), "nowhere.select chose no site"),
    ],
    ids=str,
)
def test_what_is_no_method_is_refused(method, words, tokenizer):
    """Nothing is attached, and the message says what to write."""
    with Base(make("bert"), tokenizer) as base:
        with pytest.raises(ConfigError, match=words):
            base.add("a", method)
        assert not base.adapters


def test_calls_with_wrong_arguments_are_refused(tokenizer):
    """Before any computing, by an error that names the argument and its value."""
    with Base(make("bert"), tokenizer) as base:
        base.add("a", "lora(rank=2)")
        for size in (0, -1, 2.5, "8", None, True):
            with pytest.raises(ConfigError, match="batch_size = "):
                base.predict(["a"], "a", batch_size=size)
        for texts in (None, 5, {"text": "a"}, {"a"}, b"a", ["a", None], ["a", 5]):
            with pytest.raises(ConfigError, match="texts"):
                base.predict(texts, "a")
        for adapter in (5, True, {"a"}, {"a": 1}):
            with pytest.raises(RouteError, match="adapter = "):
                base.predict(["a"], adapter)
        for pairs in (5, [5]):
            with pytest.raises(ConfigError, match="pairs"):
                base.predict(["a"], pairs=pairs)
        for seed in (1.5, "0", None, True, 2**70):
            with pytest.raises(ConfigError, match="seed = "):
                base.add("b", "lora(rank=2)", seed=seed)
        with pytest.raises(TypeError, match="provanance"):
            base.save("a", provanance={"by": "me"})
        with pytest.raises(ConfigError, match="provenance = 'me'"):
            base.save("a", provenance="me")


def test_nothing_is_merged_while_a_route_holds(tokenizer):
    """The adapter would be applied twice: by the weights, and by the route."""
    with Base(make("bert"), tokenizer) as base, torch.no_grad():
        checks.disturb(base.add("a", "lora(rank=2)").module, 1)
        row = checks.draw([None]).tokens[0]
        alone = checks.call_alone(base, row, "a")
        with base.use("a"):
            with pytest.raises(RouteError, match="cannot merge 'a' while a route holds"):
                base.merge("a")
            assert torch.equal(checks.values(base.model(input_ids=row[None]))[0], alone.squeeze(0))
        base.merge("a")
        assert checks.gap(checks.values(base.model(input_ids=row[None]))[0], alone.squeeze(0)) < 1e-5

"""Prompt tuning: learned virtual tokens before the text.

Paper: Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691;
    optional MLP as in P-tuning, Liu et al. 2021, arXiv 2103.10385.
Formula: input = [E_1 .. E_P ; embed(text)], E learned; placed directly before each row's first real token.
Parameters: P * D (the MLP, where used, is folded away after training).
Start: label words, then the most frequent tokens (the paper draws from the 5,000 most common); or text; or uniform.
Places: 'input' as in the paper, where text positions follow the virtual tokens (as PEFT does). 'embedded' as in the
    AdapterHub library: behind the embeddings' positions and norm, so that texts keep their positions.
Differs: weak on small bases: that is the paper's own finding, the gap closes near 10 B parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from onebase.core.contracts import AdapterModule, PromptDelta
from onebase.core.site import Site
from onebase.errors import UnsupportedError
from onebase.methods.method import Init, Method, check
from onebase.methods.registry import register

COMMON = 5000  # most common tokens that vocabulary initialisation samples from (Lester et al., section 3.2)


class VirtualTokens(PromptDelta):
    """Learned embeddings."""

    def __init__(self, start: Tensor, embedded: bool = False, behind: int = 0, leads: bool = False):
        super().__init__()
        self.embedding = nn.Parameter(start)  # (P, D)
        self.embedded, self.behind, self.leads = embedded, behind, leads

    def tokens(self) -> Tensor:
        """Return the parameters."""
        return self.embedding


class EncodedTokens(VirtualTokens):
    """Embeddings plus a two-layer MLP of them; the MLP's last layer starts at zero."""

    def __init__(self, start: Tensor, hidden: int, generator: torch.Generator, *where: Any):
        super().__init__(start, *where)
        width = start.shape[1]
        self.inner = nn.Parameter(torch.randn(hidden, width, generator=generator) / width**0.5)
        self.inner_bias = nn.Parameter(torch.zeros(hidden))
        self.outer = nn.Parameter(torch.zeros(width, hidden))

    def tokens(self) -> Tensor:
        """Return the encoded virtual tokens."""
        inner = torch.relu(nn.functional.linear(self.embedding, self.inner, self.inner_bias))
        return self.embedding + nn.functional.linear(inner, self.outer)


class PromptModule(AdapterModule):
    """Virtual tokens that are trained through an MLP and stored flat."""

    def fold(self) -> AdapterModule:
        """Compute the virtual tokens once and drop the MLP."""
        with torch.no_grad():
            return AdapterModule(
                {
                    name: VirtualTokens(delta.tokens().clone(), delta.embedded, delta.behind, delta.leads)  # type: ignore[union-attr,arg-type]
                    for name, delta in self.items()
                }
            )


def embedded(module: nn.Module, rows: Tensor) -> Tensor:
    """Return (P, D): what the embeddings make of embedded tokens (P, D) that are a text of their own."""
    weight = next(module.parameters())
    with torch.no_grad():
        found = module(input_ids=None, inputs_embeds=rows[None].to(weight.device, weight.dtype))
    return found[0].float().cpu()


@register
@dataclass(frozen=True, kw_only=True)
class Prompt(Method):
    """Learned virtual tokens before the text (arXiv 2104.08691).

    Attributes:
        length: P, 1 to 1024. The paper: 20 to 100.
        init: 'labels' (label words, filled up from the vocabulary), 'text', 'vocabulary' or 'uniform' (+-0.5).
        text: the words to start from when init is 'text'.
        mlp: width of a training-time MLP (P-tuning), 0 for none.
        place: 'input', or 'embedded': behind the positions and the norm of embeddings, without a position there.
        behind: real tokens of a text that stay in front of the virtual ones: 1 leaves CLS or BOS the first.
        leads: what reads the first token, a pooled head, reads the first virtual one, as heads of AdapterHub do.
    """

    name: ClassVar[str] = "prompt"
    summary: ClassVar[str] = "learned virtual tokens before the text"
    epsilon: ClassVar[float | None] = None

    length: int = 20
    init: Literal["labels", "text", "vocabulary", "uniform"] = "labels"
    text: str = ""
    mlp: int = 0
    place: Literal["input", "embedded"] = "input"
    behind: int = 0
    leads: bool = False

    def __post_init__(self) -> None:
        check(1 <= self.length <= 1024, "prompt.length", self.length, "1 to 1024")
        choices = ("labels", "text", "vocabulary", "uniform")
        check(self.init in choices, "prompt.init", self.init, f"one of {', '.join(choices)}")
        check(
            bool(self.text) == (self.init == "text"),
            "prompt.text",
            self.text,
            "a text exactly when init='text'",
        )
        check(0 <= self.mlp <= 8192, "prompt.mlp", self.mlp, "0 to 8192")
        check(self.place in ("input", "embedded"), "prompt.place", self.place, "input or embedded")
        check(0 <= self.behind <= 16, "prompt.behind", self.behind, "0 to 16")
        check(not (self.leads and self.behind), "prompt.leads", self.leads, "false where behind is not 0")

    def select(self, sites: Sequence[Site]) -> list[Site]:
        """Return the embeddings of the first stack: the encoder of an encoder-decoder."""
        first = next(site for site in sites if site.kind == "embeddings")
        if self.place == "input":
            return [first]
        chosen = [site for site in sites if site.kind == "embedded" and site.stack == first.stack]
        if not chosen:
            raise UnsupportedError(
                "prompt(place='embedded'): this base has no module that positions and norms its embeddings and lets "
                "every token see the others (encoders such as BERT have): use prompt(place='input')"
            )
        return chosen

    def build(self, sites: Sequence[Site], init: Init) -> AdapterModule:
        """Build the virtual tokens."""
        site, where = sites[0], (self.place == "embedded", self.behind, self.leads)
        start = self._start(site.d_out, init)
        if site.kind == "embedded" and self.init != "uniform":
            start = embedded(site.module, start)
        if not self.mlp:
            return AdapterModule({site.name: VirtualTokens(start, *where)})
        return PromptModule({site.name: EncodedTokens(start, self.mlp, init.generator, *where)})

    def _start(self, width: int, init: Init) -> Tensor:
        if self.init == "uniform":
            return torch.rand(self.length, width, generator=init.generator) - 0.5
        words = {"labels": list(init.labels), "text": [self.text], "vocabulary": []}[self.init]
        rows = [row for word in words for row in init.embed(word)][: self.length]
        if self.init == "text" and rows:  # repeat the text to fill the prompt
            rows = [rows[i % len(rows)] for i in range(self.length)]
        missing = self.length - len(rows)
        if missing:
            common = init.frequent(COMMON)
            picked = torch.randperm(len(common), generator=init.generator)[:missing].tolist()
            picked += [i % len(common) for i in range(missing - len(picked))]
            rows += list(init.embed_ids([common[i] for i in picked]))
        return torch.stack(rows).clone()

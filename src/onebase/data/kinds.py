"""The kinds of data: which roles each needs, in what form, and what people usually call their columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Role:
    """What a column is for.

    Attributes:
        form: how a cell becomes a value: text, image, label, labels, score, words, tags, spans, answers, start,
            messages.
        first: the column name that wins outright.
        names: names (English, French) that must be the only one of theirs; separated by white space.
    """

    form: str
    first: str
    names: str = ""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of data.

    Attributes:
        roles: what its rows have.
        optional: those of `roles` that may be missing.
        other: roles that rows may have in place of `roles`, which win where the columns have both.
        same: the roles that make two rows the same example; such rows are never on two sides of a split.
        known: the roles that make a held-out row known from train; those of `same` where not named.
        classes: the role whose values are the classes that splits are stratified by, '' for none.
        forms: role -> its form, where this kind reads it in another form than usual.
        summary: what it is, for people.
    """

    summary: str
    roles: tuple[str, ...]
    optional: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    same: tuple[str, ...]
    known: tuple[str, ...] = ()
    classes: str = ""
    forms: Mapping[str, str] = field(default_factory=dict)

    def form(self, role: str) -> str:
        """Return how a cell of a role becomes a value."""
        return self.forms.get(role) or ROLES[role].form


ROLES: dict[str, Role] = {
    "text": Role(
        form="text",
        first="text",
        names="sentence review content comment body question utterance query message tweet document passage "
        "description review_text sentence1 premise question1 text1 text_a input texts abstract article comment_text "
        "texte avis commentaire phrase contenu critique verbatim corps prémisse premisse phrase1 texte1",
    ),
    "text_pair": Role(
        form="text",
        first="text_pair",
        names="sentence2 hypothesis question2 text2 text_b phrase2 texte2 hypothèse hypothese",
    ),
    "label": Role(
        form="label",
        first="label",
        names="labels class category sentiment target intent topic rating polarity gold emotion score label_text "
        "label_name stars relevance relevant "
        "étiquette etiquette catégorie categorie classe cible thème theme intention note polarité polarite "
        "libellé libelle",
    ),
    "labels": Role(form="labels", first="labels", names="label tags topics genres categories étiquettes classes"),
    "score": Role(
        form="score",
        first="score",
        names="label similarity similarity_score rating value target stars note similarité valeur",
    ),
    "image": Role(
        form="image",
        first="image",
        names="image_path image_file img picture photo file_name filename filepath file path fichier chemin",
    ),
    "tokens": Role(form="words", first="tokens", names="words token mots"),
    "tags": Role(form="tags", first="tags", names="ner_tags pos_tags labels ner pos tag étiquettes"),
    "spans": Role(form="spans", first="spans", names="entities entités"),
    "question": Role(form="text", first="question", names="query"),
    "context": Role(form="text", first="context", names="passage paragraph document contexte"),
    "answers": Role(form="answers", first="answers", names="answer answer_text réponse réponses"),
    "answer_start": Role(form="start", first="answer_start", names="start start_position"),
    "source": Role(form="text", first="source", names="src article document dialogue input text texte"),
    "target": Role(form="text", first="target", names="tgt summary highlights translation output résumé cible"),
    "messages": Role(form="messages", first="messages", names="conversations conversation chat dialog"),
    "anchor": Role(form="text", first="anchor", names="query question sentence1"),
    "positive": Role(form="text", first="positive", names="pos answer sentence2"),
    "negative": Role(form="text", first="negative", names="neg hard_negative"),
    "query": Role(form="text", first="query", names="question anchor requête"),
    "document": Role(form="text", first="document", names="passage doc context"),
    "prompt": Role(form="text", first="prompt", names="instruction input source question query consigne invite entrée"),
    "completion": Role(
        form="text", first="completion", names="response output answer target reply réponse reponse sortie cible"
    ),
}

KINDS: dict[str, Kind] = {
    "classification": Kind(
        summary="one class per text or pair",
        roles=("text", "text_pair", "label"),
        optional=("text_pair",),
        same=("text", "text_pair"),
        classes="label",
    ),
    "image-classification": Kind(
        summary="one class per picture", roles=("image", "label"), same=("image",), classes="label"
    ),
    "multilabel": Kind(
        summary="any number of classes per text",
        roles=("text", "text_pair", "labels"),
        optional=("text_pair",),
        same=("text", "text_pair"),
        classes="labels",
    ),
    "regression": Kind(
        summary="a number per text or pair",
        roles=("text", "text_pair", "score"),
        optional=("text_pair",),
        same=("text", "text_pair"),
    ),
    "tokens": Kind(
        summary="a tag per word, or a text and its labelled pieces",
        roles=("tokens", "tags"),
        other=("text", "spans"),
        same=("tokens", "text"),
    ),
    "qa": Kind(
        summary="answers that are spans of a context",
        roles=("question", "context", "answers"),
        same=("context",),
        known=("question", "context"),
    ),
    "seq2seq": Kind(summary="a target text per source text", roles=("source", "target"), same=("source",)),
    "chat": Kind(summary="conversations", roles=("messages",), same=("messages",)),
    "embeddings": Kind(
        summary="texts that belong together",
        roles=("anchor", "positive", "negative"),
        optional=("negative",),
        same=("anchor",),
        known=("anchor", "positive"),
    ),
    "similarity": Kind(
        summary="how alike two texts are", roles=("text", "text_pair", "score"), same=("text", "text_pair")
    ),
    "rerank": Kind(
        summary="how relevant a document is to a query",
        roles=("query", "document", "label"),
        same=("query",),
        known=("query", "document"),
        forms={"label": "score"},
    ),
    "completion": Kind(summary="what follows a prompt", roles=("prompt", "completion"), same=("prompt",)),
    "causal-lm": Kind(summary="text to continue", roles=("text",), same=("text",)),
    "masked-lm": Kind(summary="text to fill gaps in", roles=("text",), same=("text",)),
}
# The roles that are predicted from the others; a set of rows has at most one of them.
TARGETS = ("label", "labels", "score", "tags", "spans")
# Kinds whose target is a number, not a name.
MEASURED = ("regression", "similarity", "rerank")
# Kinds that plain text without columns can be.
PLAIN = ("causal-lm", "masked-lm")
SHORT = {"mlm": "masked-lm", "clm": "causal-lm"}  # what people also call them

"""What the examples of the documentation find in their folder: small data, tiny bases, and one stored adapter."""

from __future__ import annotations

import csv
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

REVIEWS = {"en": ("reviews", "more-en", "a"), "fr": ("avis", "more", "b")}
ABUSIVE = (
    "Le professionnel peut modifier le prix à tout moment et sans préavis.",
    "Aucune somme ne sera remboursée, quelle qu'en soit la raison.",
    "Le client renonce à tout recours devant un tribunal.",
    "Le contrat est reconduit sans que le client puisse s'y opposer.",
    "La société n'est jamais responsable de ses retards.",
    "Le consommateur accepte d'avance toute modification du service.",
    "Seul le vendeur peut résilier, et sans motif.",
    "Toute réclamation est réputée infondée.",
)
ORDINARY = (
    "La livraison a lieu dans un délai de cinq jours ouvrés.",
    "Le paiement s'effectue par carte bancaire.",
    "La facture est envoyée par courrier électronique.",
    "Le siège de la société se trouve à Lyon.",
    "Le client dispose d'un délai de quatorze jours pour se rétracter.",
    "Le contrat prend effet à la date de sa signature.",
    "Les pièces détachées sont garanties deux ans.",
    "Le service après-vente est ouvert du lundi au vendredi.",
    "Le tarif en vigueur figure en annexe.",
    "Chaque partie reçoit un exemplaire du contrat.",
    "Les données du client sont conservées trois ans.",
    "La commande est confirmée par un message.",
)
CONTRACT = (
    "Article 1. La livraison a lieu dans un délai de dix jours. Le siège de la société se trouve à Nantes.\n\n"
    "Article 2. Le vendeur peut modifier le prix à tout moment et sans préavis. La facture est envoyée par courrier.\n"
)
JOBS = """
jobs:
  - data: reviews.csv
    method: lora(rank=4)
    settings: {lr: 1e-3, epochs: 1}
  - data: avis.csv
    name: avis
    method: bottleneck(preset='pfeiffer')
    settings: {epochs: 1}
"""


def reviews(language: str) -> Iterator[tuple[str, str]]:
    """Yield (text, label) of the demo's reviews in one language, the labels in turn."""
    from onebase.demo import REVIEWS as folder

    with (folder / "train.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["language"] == language]
    by_label = {label: [r["text"] for r in rows if r["label"] == label] for label in sorted({r["label"] for r in rows})}
    for texts in zip(*by_label.values()):
        yield from zip(texts, by_label)


def write(path: Path, rows: Iterable[tuple[str, str]]) -> None:
    """Write a CSV of texts and labels."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(rows)


def write_data(folder: Path, tasks: int = 20) -> None:
    """Write every file that the examples read."""
    for language, names in REVIEWS.items():
        rows = list(reviews(language))
        for i, name in enumerate(names):
            write(folder / f"{name}.csv", rows[30 * i : 30 * (i + 1)])
    clauses = [(text, "abusive") for text in ABUSIVE] + [(text, "ordinary") for text in ORDINARY]
    write(folder / "clauses.csv", [(f"{text} (clause {i})", label) for i in (1, 2) for text, label in clauses])
    (folder / "contract.txt").write_text(CONTRACT, encoding="utf-8")
    (folder / "jobs.yaml").write_text(JOBS, encoding="utf-8")
    rows = list(reviews("en"))
    for i in range(tasks):
        write(folder / "tasks" / f"task-{i + 1:02}.csv", rows[3 * i : 3 * i + 30])


def write_bases(folder: Path) -> None:
    """Save tiny bases with random values under the names that the examples give, and an adapter that PEFT wrote."""
    from families import make, tiny_tokenizer

    for name, family in (("camembert-base", "camembert"), ("gpt2", "gpt2")):
        model = make(family)
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    import peft

    lora = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads what transformers has renamed
        peft.get_peft_model(model, lora).save_pretrained(str(folder / "some" / "peft-adapter"))


def store_adapter(folder: Path, name: str = "legal-fr") -> None:
    """Train and store the adapter that pages name without training it."""
    import onebase as ob

    with ob.load_base("minilm") as base:
        ob.train(base, folder / "clauses.csv", "lora(rank=2)", name=name, epochs=1, attention="eager", dtype="float32")

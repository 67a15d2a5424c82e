"""Family rows: one entry per family says where everything is. Adding a family is adding a row to one of these files."""

from onebase.anatomy.families import albert, bert, gpt, images, llama, seq2seq
from onebase.anatomy.rows import Family

ROWS: tuple[Family, ...] = (*bert.ROWS, *albert.ROWS, *llama.ROWS, *gpt.ROWS, *seq2seq.ROWS, *images.ROWS)

FAMILIES: dict[str, Family] = {model_type: row for row in ROWS for model_type in row.model_types}

"""Training: one loop, defaults that work for each method, and a result that shows the base beside the adapter."""

from onebase.training.jobs import Job
from onebase.training.many import Failed, train_many
from onebase.training.run import Run, train
from onebase.training.settings import Settings

__all__ = ["Failed", "Job", "Run", "Settings", "train", "train_many"]

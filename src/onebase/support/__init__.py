"""What works where: every text model class of the installed transformers, tried with every method."""

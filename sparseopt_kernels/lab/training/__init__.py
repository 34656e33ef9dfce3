"""``sparseopt train``: data, models and the training loop. No experiment of the paper is known here."""

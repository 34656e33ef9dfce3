"""``sparseopt demo``: what the recipe is worth on real data, and how fast a step is (by ``bench``)."""

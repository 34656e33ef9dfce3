"""``sparseopt demo``: what the recipe is worth on real data, and how fast a step is (by ``bench``).

Here may be what the demo shows. Data, models and training are those of ``training``.
"""

"""Correlations and F1 of random predictions by their definitions, in numpy, as scikit-learn and SciPy compute them. Usage: python make_agreement.py."""

import json
from pathlib import Path

import numpy as np


def matthews(chosen, right):
    """Gorodkin's R_K from the indicator matrices' covariances, which is how scikit-learn's documentation defines it."""
    classes = np.arange(max(chosen.max(), right.max()) + 1)
    x, y = (np.equal.outer(labels, classes).astype(float) for labels in (chosen, right))
    covariance = lambda a, b: np.mean((a - a.mean(axis=0)) * (b - b.mean(axis=0)), axis=0).sum()
    spread = covariance(x, x) * covariance(y, y)
    return covariance(x, y) / np.sqrt(spread) if spread > 0 else 0.0


def f1(chosen, right):
    precision, recall = np.mean(right[chosen == 1] == 1), np.mean(chosen[right == 1] == 1)
    return 2 * precision * recall / (precision + recall)


def ranks(values):
    """Mean ranks: how many are smaller, and half of those that are equal."""
    return np.array([np.sum(values < v) + (np.sum(values == v) + 1) / 2 for v in values])


if __name__ == "__main__":
    random = np.random.default_rng(7)
    classes = []
    for count, n in ((2, 40), (2, 277), (3, 100), (5, 64)):
        right = random.integers(0, count, n)
        chosen = np.where(random.random(n) < 0.6, right, random.integers(0, count, n))
        classes.append({"chosen": chosen.tolist(), "right": right.tolist(), "matthews": matthews(chosen, right), "f1": f1(chosen, right)})
    numbers = []
    for n, noise in ((12, 0.1), (150, 1.0), (60, 30.0)):
        right = np.round(random.random(n) * 5, 1)
        said = right + noise * random.standard_normal(n)
        said[: n // 3] = np.round(said[: n // 3])
        numbers.append({"said": said.tolist(), "right": right.tolist(), "pearson": np.corrcoef(said, right)[0, 1], "spearman": np.corrcoef(ranks(said), ranks(right))[0, 1]})
    text = json.dumps({"classes": classes, "numbers": numbers}) + "\n"
    (Path(__file__).parent / "agreement.json").write_text(text)

"""pymoo's NSGA-II on a problem shaped like ours, and its deterministic parts on random points.

Usage: pip install -r requirements.txt; python make_search.py (writes runs.json, operators.json and sorting.json beside itself).

The operators are those that NNCF's BootstrapNAS gives pymoo, which LoNAS's scripts call: integer sampling, SBX(0.9, 10) and
PM(0.02, 3) with rounding, duplicates eliminated, the initial population counted as generation 1.
"""

import json
from pathlib import Path

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2, calc_crowding_distance
from pymoo.core.callback import Callback
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.sampling import Sampling
from pymoo.indicators.hv import HV
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.optimize import minimize
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

HERE = Path(__file__).parent
LAYERS, SEEDS, GENERATIONS, POPULATIONS = 30, 40, 25, (8, 40)
CHOICES = [2] * LAYERS + [5] * LAYERS + [2] * LAYERS
SAMPLES = 200_000


def crossover():
    return SBX(prob=0.9, eta=10.0, vtype=float, repair=RoundingRepair())


def mutation(prob=0.02):
    return PM(prob=prob, eta=3.0, vtype=float, repair=RoundingRepair())


def objectives(X):
    """(cost, error) of genomes (n, groups): tests/search/problem.rs has the same formula in the same order of operations."""
    cost, linear, mixed = np.full(len(X), 100.0), np.zeros(len(X)), np.zeros(len(X))
    cut = X / (np.array(CHOICES) - 1)
    for g in range(len(CHOICES)):
        kind, layer, x = g // LAYERS, g % LAYERS, cut[:, g]
        saved = (0.125, 1.0, 0.25)[kind] * (1.0 + 0.125 * ((layer * 7) % 5))
        cost -= saved * x
        hurt = (0.25, 1.0, 0.125)[kind] * (0.125 + ((layer * 37 + kind * 11) % 29) / 16.0)
        linear += hurt * (0.5 * x + 0.5 * x * x)
        if layer > 0:
            mixed += 0.25 * hurt * x * cut[:, g - 1]
    total = linear + mixed
    return np.stack([cost, total + total * total / 64.0], axis=1)


class UniformSampling(Sampling):
    """As NNCF samples: pymoo's own integer sampling rounds, so that the first and last choices come half as often."""

    def _do(self, problem, n_samples, **kwargs):
        return np.random.randint(problem.xl, problem.xu + 1, size=(n_samples, problem.n_var))


class Synthetic(Problem):
    def __init__(self):
        super().__init__(n_var=len(CHOICES), n_obj=2, xl=0, xu=np.array(CHOICES) - 1, vtype=int)

    def _evaluate(self, X, out, *args, **kwargs):
        out["F"] = objectives(X)


def reference_point():
    """The cost of the maximal and the error of the minimal sub-network."""
    widest = objectives(np.zeros((1, len(CHOICES))))[0]
    narrowest = objectives(np.array([CHOICES]) - 1.0)[0]
    return np.array([widest[0], narrowest[1]])


class Hypervolumes(Callback):
    """Of the population's first front, generation by generation."""

    def __init__(self, indicator):
        super().__init__()
        self.indicator, self.values = indicator, []

    def notify(self, algorithm):
        self.values.append(float(self.indicator(algorithm.opt.get("F"))))


def runs():
    reference = reference_point()
    out = {"reference": reference.tolist(), "generations": GENERATIONS, "hypervolumes": {}}
    for population in POPULATIONS:
        of_seeds = []
        for seed in range(SEEDS):
            algorithm = NSGA2(pop_size=population, sampling=UniformSampling(), crossover=crossover(),
                              mutation=mutation(), eliminate_duplicates=True)
            callback = Hypervolumes(HV(ref_point=reference))
            minimize(Synthetic(), algorithm, ("n_gen", GENERATIONS), seed=seed, callback=callback)
            of_seeds.append(callback.values)
        out["hypervolumes"][str(population)] = of_seeds
    chosen = np.random.default_rng(5).integers(0, CHOICES, size=(12, len(CHOICES)))
    out["examples"] = [{"genome": x.tolist(), "objectives": f.tolist()} for x, f in zip(chosen, objectives(chosen))]
    return out


class OneGene(Problem):
    """One gene of interest with `choices` values and 89 more, so that the rate of mutation is that of 90 groups."""

    def __init__(self, choices):
        super().__init__(n_var=90, n_obj=1, xl=0, xu=np.array([choices - 1] + [1] * 89), vtype=int)


def operators():
    """How often a gene becomes which value, out of SAMPLES children."""
    np.random.seed(11)
    out = {"samples": SAMPLES, "crossover": [], "mutation": []}
    for choices, one, other in ((2, 0, 1), (3, 0, 1), (3, 0, 2), (5, 0, 4), (5, 1, 2), (5, 1, 3), (5, 4, 2), (5, 3, 3)):
        problem, pairs = OneGene(choices), SAMPLES // 2
        pop = Population.new("X", np.array([[one] + [0] * 89, [other] + [0] * 89]))
        children = crossover()(problem, pop, np.tile([0, 1], (pairs, 1))).get("X")[:, 0]
        both = np.bincount(np.asarray(children[:pairs] * choices + children[pairs:], dtype=int), minlength=choices * choices)
        out["crossover"].append({"choices": choices, "parents": [one, other], "pairs": both.tolist()})
    for choices, value in ((2, 0), (2, 1), (3, 1), (5, 0), (5, 2), (5, 4)):
        problem = OneGene(choices)
        pop = Population.new("X", np.tile([value] + [0] * 89, (SAMPLES, 1)))
        # Every child is mutated, so that there is something to count; the rate of children is counted below.
        counts = np.bincount(mutation(1.0)(problem, pop).get("X")[:, 0].astype(int), minlength=choices)
        out["mutation"].append({"choices": choices, "value": value, "counts": counts.tolist()})
    pop = Population.new("X", np.zeros((SAMPLES, 90), dtype=int))
    changed = (mutation()(OneGene(2), pop).get("X") != 0).sum(axis=1)
    out["changed"] = np.bincount(changed, minlength=8).tolist()
    return out


def sorting():
    """Fronts, crowding distances and hypervolumes of random points, ties and duplicates among them."""
    random, cases = np.random.default_rng(3), []
    for case in range(60):
        n, m = int(random.integers(1, 40)), 2 if case % 3 else 3
        # Few distinct values, so that points tie in one objective or in all.
        F = random.integers(0, (4, 12, 1000)[case % 3 if case % 2 else 2], size=(n, m)).astype(float) / 8.0
        fronts = NonDominatedSorting().do(F)
        fronts = [sorted(map(int, front)) for front in fronts]
        crowding = [[None if np.isinf(c) else float(c) for c in calc_crowding_distance(F[front])] for front in fronts]
        of_all = [None if np.isinf(c) else float(c) for c in calc_crowding_distance(F)]
        reference = F.max(axis=0) - (0.25 if case % 5 == 0 else -0.25)
        cases.append({"points": F.tolist(), "fronts": fronts, "crowding": crowding, "crowding_of_all": of_all,
                      "reference": reference.tolist(), "hypervolume": float(HV(ref_point=reference)(F)) if m == 2 else None})
    return cases


if __name__ == "__main__":
    for name, made in (("runs", runs()), ("operators", operators()), ("sorting", sorting())):
        (HERE / f"{name}.json").write_text(json.dumps(made) + "\n")

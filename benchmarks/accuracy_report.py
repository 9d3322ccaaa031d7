"""The table and the plot of accuracies: means over seeds, and differences paired by seed."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.accuracy_grids import Comparison

CONFIDENCE = 0.95
NO_DIFFERENCE = 'no difference seen'
NOTES = (
    'Accuracy is that of the network after the last step, in percent: the best of several '
    'evaluations would be chosen by the images that it is measured on. Differences are in '
    'percentage points, between runs of the same seed, with the 95% interval of their mean by '
    "Student's t. It covers the seeds, not the choice of the test images, and no row is corrected "
    'for the number of rows: where no network differs from another, one row in twenty still shows '
    'a difference.'
)

# Accuracy in [0, 1] by seed.
Accuracies = Mapping[int, float]


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
      count: Number of values.
      mean: Their mean.
      deviation: Their standard deviation, with n - 1; None for one value.
      low, high: The ends of the interval; None for one value.
    """

    count: int
    mean: float
    deviation: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def finding(self) -> str:
        """States in words what an interval of differences shows."""
        if self.low is None or self.high is None:
            return 'one seed: not known'
        if self.low <= 0 <= self.high:
            return NO_DIFFERENCE
        return 'higher' if self.low > 0 else 'lower'


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Returns the mean of values with its confidence interval by Student's t.

    Raises:
      ValueError: There is no value.
    """
    from scipy.stats import t

    if not values:
        raise ValueError('a mean needs a value')
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return Interval(count, mean)
    deviation = statistics.stdev(values)
    half = float(t.ppf((1 + confidence) / 2, count - 1)) * deviation / math.sqrt(count)
    return Interval(count, mean, deviation, mean - half, mean + half)


def difference(accuracies: Accuracies, baseline: Accuracies) -> Interval | None:
    """Returns the mean difference of the seeds that both have; None where there is none."""
    seeds = sorted(accuracies.keys() & baseline.keys())
    return interval([accuracies[seed] - baseline[seed] for seed in seeds]) if seeds else None


def shown(
    comparisons: Sequence[Comparison], accuracies: Mapping[str, Accuracies]
) -> list[Comparison]:
    """Returns the comparisons with two networks that have finished runs, or else with one."""
    for least in (2, 1):
        found = [each for each in comparisons if len(_finished(each, accuracies)) >= least]
        if found:
            break
    return found


def _finished(comparison: Comparison, accuracies: Mapping[str, Accuracies]) -> list[str]:
    names = (comparison.baseline, *comparison.networks)
    return [name for name in names if accuracies.get(name)]


def comparison_rows(
    comparison: Comparison, accuracies: Mapping[str, Accuracies], parameters: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Makes a row for the baseline and for each network that has finished runs."""
    rows = []
    for name in _finished(comparison, accuracies):
        of_network = accuracies[name]
        own = interval(list(of_network.values()))
        against = None
        if name != comparison.baseline:
            against = difference(of_network, accuracies.get(comparison.baseline, {}))
        rows.append(
            {
                'network': name,
                'parameters': f'{parameters[name]:,}',
                'seeds': own.count,
                'accuracy': f'{own.mean:.2%}'.rstrip('%'),
                'deviation': _points(own.deviation),
                f'against {comparison.baseline}': _points(against and against.mean, '+'),
                '95% interval': _ends(against),
                'finding': against.finding if against else '-',
            }
        )
    return rows


def _points(share: float | None, sign: str = '') -> str:
    return '-' if share is None else f'{100 * share:{sign}.2f}'


def _ends(of: Interval | None) -> str:
    if of is None or of.low is None:
        return '-'
    return f'{_points(of.low, "+")} to {_points(of.high, "+")}'


def draw(comparisons: Sequence[Comparison], accuracies: Mapping[str, Accuracies]) -> Any:
    """Draws every run as a point, and each network's mean with its interval; a panel a comparison.

    Returns:
      A matplotlib Figure; `gcnet_jax.analysis.pictures.save_figure` writes it.
    """
    from matplotlib.figure import Figure

    panels = [(each.title, _finished(each, accuracies)) for each in shown(comparisons, accuracies)]
    heights = [len(names) + 1 for _, names in panels]
    figure = Figure(figsize=(7, 0.8 + 0.32 * sum(heights)), layout='constrained')
    axes = figure.subplots(
        len(panels), 1, sharex=True, squeeze=False, gridspec_kw={'height_ratios': heights}
    )[:, 0]
    for panel, (title, names) in zip(axes, panels, strict=True):
        for row, name in enumerate(names):
            values = [100 * value for value in accuracies[name].values()]
            own, colour = interval(values), '0.35' if row == 0 else 'tab:blue'
            panel.plot(values, [row] * len(values), 'o', color=colour, alpha=0.3, markersize=4)
            half = 0.0 if own.high is None else own.high - own.mean
            panel.errorbar(own.mean, row, xerr=half, fmt='|', color=colour, capsize=3)
            if row == 0:
                panel.axvline(own.mean, color=colour, linewidth=0.8, linestyle=':')
        panel.set_yticks(range(len(names)), names)
        panel.set_ylim(len(names) - 0.4, -0.6)
        panel.set_title(title, loc='left', fontsize=10)
        panel.grid(axis='x', alpha=0.3)
        panel.spines[['top', 'right']].set_visible(False)
    axes[-1].set_xlabel('accuracy after the last step, %; bars: 95% interval of the mean')
    return figure

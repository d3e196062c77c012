"""A comparison of experiments in words: its table, and a verdict for each pair."""

from collections.abc import Mapping, Sequence

from luthier.scoring.audit import leaks_in_words
from luthier.scoring.comparison import RunResult, Verdict
from luthier.terminal import percent, plural

BEST_OF_MANY = (
    "- The best of several experiments looks a little better than it is: test has chosen it. Score it on other images "
    "before you rely on its figure, or cut test anew with --split_seed."
)
OF_RUNS = (
    "- The 95% interval is by the test images. The lowest and the highest accuracy are of single runs: runs of "
    "several seeds differ by chance, and those of several folds have other test images too."
)


def comparison_in_words(rows: list[dict], verdicts: Sequence[Verdict], found: Sequence[str] = ()) -> str:
    """Return the table and the verdicts of a comparison in Markdown, and lines on what was found in the runs."""
    caution = [*found]
    caution += [f"- Each p is adjusted for {len(verdicts)} comparisons (Holm)."] if len(verdicts) > 1 else []
    caution += [OF_RUNS] if any(row["runs"] > 1 for row in rows) else []
    caution += [BEST_OF_MANY] if len(rows) > 2 else []
    return "\n".join([comparison_table(rows), "", *map(verdict_in_words, verdicts), *caution])


def leaks_of_experiments(results: Mapping[str, Mapping[str, RunResult]]) -> list[str]:
    """Return which experiments' scores may be too high, by the first run of each that knows why; a line for each why.

    Args:
        results: by experiment, and by seed or fold.
    """
    names: dict[tuple[str, str], list[str]] = {}
    for name, parts in results.items():
        known = ((part, leaks_in_words(result.metrics)) for part, result in parts.items())
        for found in [each for each in known if each[1]][:1]:
            names.setdefault(found, []).append(name)
    return [f"- {', '.join(alike)} ({part}): {said}." for (part, said), alike in names.items()]


def probes_of_experiments(results: Mapping[str, Mapping[str, RunResult]]) -> list[str]:
    """Return a line that names the experiments whose training has not beaten the probe; none where there are none.

    Args:
        results: by experiment, and by seed or fold.
    """
    named = []
    for name, parts in results.items():
        recipes = [run.metrics["recipe"] for run in parts.values()]
        count = sum(each["kept"] == "the probe" and not each["recipe"].startswith("probe:") for each in recipes)
        named += [f"{name} ({count} of {plural(len(parts), 'run')})"] if count else []
    return [f"- Training did not beat the probe, which was scored in its place: {', '.join(named)}."] if named else []


def comparison_table(rows: list[dict]) -> str:
    """Return the rows of `comparison.summarise_experiment` as a Markdown table."""
    lines = [
        "| experiment | runs | test accuracy, mean (lowest to highest) | 95% interval | n | validation | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['experiment']} | {row['runs']} "
            f"| {percent(row['test accuracy'])} ({percent(row['lowest'])} to {percent(row['highest'])}) "
            f"| {percent(row['interval low'])} to {percent(row['interval high'])} | {row['n']} "
            f"| {percent(row['validation accuracy'])} | {row['seconds']:.0f} |"
        )
    return "\n".join(lines)


def verdict_in_words(verdict: Verdict) -> str:
    """Return which of two experiments is better, or that the difference is too small to tell."""
    a, b = verdict.a, verdict.b
    groups = f" in {plural(verdict.groups, 'group')}" if verdict.groups else ""
    votes = (
        f"{verdict.for_a} for {a}, {verdict.for_b} for {b}, of {plural(verdict.n, 'test image')}{groups}; "
        f"p = {verdict.p:.2g}"
    )
    if verdict.alike:
        return (
            f"- {a} and {b}: right and wrong on the same of {plural(verdict.n, 'test image')}. If that surprises you, "
            "check that what differs between them has an effect: a probe, for one, sees no augmentation."
        )
    if not verdict.is_clear:
        return f"- {a} and {b}: too close to call at n = {verdict.n} ({votes})."
    return f"- {a} is {'better' if verdict.for_a > verdict.for_b else 'worse'} than {b} ({votes})."

"""Chooses the default factor and form of entry-wise shrinkage, and writes docs/shrinkage.md and its picture.

An entry is y = x + n with x ~ N(0, 1) and n Cauchy(0, γ) with probability ε. The risk of an estimator of x is its mean
squared error, by quadrature over y: p(y) and E[x|y] have closed forms. τ is a factor times the scale that entry_scale
measures, whose population value is taken here.
"""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from spectrim.lab.claims.entry_noise import risks
from spectrim.lab.files import write_atomically, write_text
from spectrim.operators import DEFAULT_SHRINK_FACTOR, DEFAULT_SHRINK_FORM

DOCS = Path(__file__).parent.parent / "docs"
SHARES = (0.0, 0.001, 0.01, 0.1, 0.5, 1.0)
SCALES = (0.1, 0.3, 1.0, 3.0, 10.0)
LARGEST_LIKELY_SHARE = 0.1  # beyond, the measured scale is that of the noise, and no factor of it serves
FACTORS = tuple(round(0.5 * 2 ** (i / 4), 3) for i in range(21))
FORMS = ("redescending", "monotone", "hard")


def main() -> None:
    grid = {
        (gamma, share): risks(gamma, share, FACTORS, FORMS)
        for share in SHARES
        for gamma in SCALES
        if share > 0 or gamma == 1
    }
    likely = [entry for (_, share), entry in grid.items() if share <= LARGEST_LIKELY_SHARE]
    excess = {
        form: [sum(risk[form][i] - least for least, risk in likely) / len(likely) for i in range(len(FACTORS))]
        for form in FORMS
    }
    best = {form: min(range(len(FACTORS)), key=lambda i: excess[form][i]) for form in FORMS}
    header = ["ε", "γ", "Bayes", *(f"{form}, factor {FACTORS[best[form]]:g}" for form in FORMS)]
    lines = [header, ["---"] * len(header)]
    for (gamma, share), (least, risk) in grid.items():
        cells = [f"{share:g}", f"{gamma:g}" if share else "", f"{abs(least):.3f}"]
        lines.append(cells + [f"{risk[form][best[form]]:.3f}" for form in FORMS])
    means = [f"{excess[form][best[form]]:.4f}" for form in FORMS]
    lines.append([f"mean excess, ε <= {LARGEST_LIKELY_SHARE:g}", "", "0", *means])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    DOCS.joinpath("images").mkdir(parents=True, exist_ok=True)
    draw(excess, DOCS / "images" / "shrinkage_risk.svg")
    write_text(DOCS / "shrinkage.md", TEXT.format(table=table, form=DEFAULT_SHRINK_FORM, factor=DEFAULT_SHRINK_FACTOR))
    for form in FORMS:
        print(f"{form}: factor {FACTORS[best[form]]:g}, mean excess risk {excess[form][best[form]]:.4f}")


def draw(excess: dict[str, list[float]], path: Path) -> None:
    with rc_context({"svg.hashsalt": "spectrim", "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.add_subplot()
        for form, style in zip(FORMS, ("-", "--", ":"), strict=True):
            axes.semilogx(FACTORS, excess[form], style, label=form, base=2)
        axes.set_xlabel("factor: τ over the scale of the entries")
        axes.set_ylabel("mean excess of risk over the Bayes risk")
        axes.set_ylim(bottom=0, top=0.2)
        axes.set_title("Entry-wise shrinkage under contaminated noise", loc="left")
        axes.legend(frameon=False)
        write_atomically(path, lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))


TEXT = """\
# Choose the form and factor of entry-wise shrinkage

<!-- Written by benchmarks/shrinkage_risk.py. Edit that. -->

Keep the default form, `{form}`, which this page justifies. Compare factors on your own task with `spectrim compare`.
The default factor, {factor:g}, does not come from this page: the model below ignores what an optimizer does with the
gradient afterwards, and larger factors were better in training ([evidence](evidence.md)).

An entry is y = x + n with x ~ N(0, 1) and, with probability ε, n ~ Cauchy(0, γ). The risk is the mean squared error
of an estimate of x; an estimate of zero has risk 1. "Bayes" is `bayes_shrink`, which has the least risk. The other
columns are `smooth_shrink` with the factor of `entry_scale` that minimises the mean excess over the Bayes risk for ε
<= 0.1. With more noise than that, the entry scale is dominated by the noise.

{table}

![Mean excess risk against the factor](images/shrinkage_risk.svg)
"""


if __name__ == "__main__":
    main()

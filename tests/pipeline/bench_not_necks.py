"""The table of pictures that are no necks in `pipeline/README.md`, and how many necks in scope the same rules decline.

`python -m pytest -q -s tests/pipeline/bench_not_necks.py`: a measurement, not a test; nothing fails here. PICTURES of
each kind (50), PAIRS of necks of the stress plan (1500) and a third as many of another camera: from the environment.
"""

import os
from collections import Counter

from models.weights import LoadedModel
from pipeline.analyse import analyse_views, load_model
from pipeline.cohort import CohortPlan
from pipeline.finding import Declined, ViewImage
from pipeline.phantom import phantom
from pipeline.quality import problem_of
from pipeline.train_demonstration import NAME, images_of
from tests.pipeline.not_necks import KINDS, draw

PICTURES = int(os.environ.get("PICTURES", "50"))
PAIRS = int(os.environ.get("PAIRS", "1500"))
FIRST_SEED = 1000
PLANS = {
    "stress plan": CohortPlan(53_000_000, PAIRS, stratum_period=1, stratum_run=1, confusers=8.0),
    "another camera": CohortPlan(54_000_000, PAIRS // 3, physics="other", prevalence=0.5),
}


def test_pictures_that_are_no_necks_by_the_rules_and_by_all() -> None:
    model = load_model(NAME)
    print(f"\n| picture, {PICTURES} of each | by the rules | and by the embedding | answered |")
    print("| --- | --- | --- | --- |")
    for kind in KINDS:
        rules: Counter[str] = Counter()
        embedding, answers = 0, Counter[str]()
        for number in range(PICTURES):
            reason, answer = _said(draw(kind, FIRST_SEED + number), model)
            if reason is not None:
                rules[reason] += 1
            elif answer is None:
                embedding += 1
            else:
                answers[answer] += 1
        reasons = ", ".join(f"`{reason}` {count}" for reason, count in rules.most_common()) or "0"
        said = ", ".join(f"{answer} {count}" for answer, count in answers.most_common()) or "0"
        print(f"| {kind} | {reasons} | {embedding} | {said} |", flush=True)


def test_necks_in_scope_that_the_rules_decline() -> None:
    training_range = load_model(NAME).record.training_range
    for name, plan in PLANS.items():
        declined = single = 0
        for index in range(plan.pairs):
            stratum, residual = plan.draw(index)
            seed = plan.first_seed + index
            scan = phantom(seed, stratum=stratum, residual=residual, physics=plan.physics, confusers=plan.confusers)
            views = images_of(scan.anterior, scan.posterior, scan.spacing_mm)
            if (problem := problem_of(views, training_range)) is not None:
                declined += 1
                print(f"  {name}, seed {seed}, {scan.truth.stratum}: {problem.reason}, {problem.detail}")
            single += sum(problem_of([view], training_range) is not None for view in views)
        print(f"{name}: {declined} of {plan.pairs} pairs declined, {single} of {2 * plan.pairs} views judged alone")


def _said(views: tuple[ViewImage, ...], model: LoadedModel) -> tuple[str | None, str | None]:
    """The rules' reason, else None and the whole chain's finding; two times None where only the embedding declines."""
    if (problem := problem_of(views, model.record.training_range)) is not None:
        return problem.reason, None
    answer = analyse_views(views, model, outlined=False)
    return (None, None) if isinstance(answer, Declined) else (None, answer.finding)

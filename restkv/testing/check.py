"""check_policy: every law that a policy's options admit, on cases that hypothesis draws; and the smallest that breaks one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st

from modeling.modes import own_modes
from restkv.budgets import ALLOCATIONS
from restkv.errors import PolicyError
from restkv.policies import POLICIES, Policy
from restkv.policies.base import require_policy
from restkv.testing.cases import Look, as_arguments, fitted, looks, schedules
from restkv.testing.laws import LARGE, LARGEST, NOTED, OBSERVED, QUERIES, SESSIONS, Choice, Law
from restkv.testing.sessions import Job, Runs

LAWS: Mapping[str, Law] = {law.name: law for law in (*OBSERVED, *LARGEST, *SESSIONS)}
Progress = Callable[[str, int], None]  # the name of a law, and how many cases have kept it so far


class LawBroken(AssertionError):
    """A policy breaks a law. One line: which, in which case, and what to do.

    Attributes:
        policy: the policy, with the options of the case.
        law: its name, a key of restkv.testing.LAWS.
        case: the arguments with which `replay(policy, law, **case)` breaks it again.
    """

    def __init__(self, policy: Policy, law: Law, case: dict[str, Any], wrong: str) -> None:
        self.policy, self.law, self.case, self.wrong = policy, law.name, case, wrong
        arguments = "".join(f", {name}={value!r}" for name, value in case.items())
        super().__init__(
            f"{policy.name}: law {law.name!r} is broken: {wrong}; in replay({written(policy)}, {law.name!r}{arguments}). "
            f"It says: {law.says} Mend: {law.mend}"
        )

    def script(self) -> str:
        """A Python script that runs this case alone."""
        name, cls = self.policy.name, type(self.policy)
        allocations = {value for value in (self.policy.budget_by,) if _allocation(value) is None}
        known = POLICIES.get(name) is cls or not _importable(cls)
        lines = [
            f'"""{name} breaks the law {self.law!r}."""',
            "",
            *sorted(f"from restkv.budgets import {type(value).__name__}" for value in allocations),
            "from restkv.policies import get_policy" if known else f"from {cls.__module__} import {cls.__qualname__}",
            "from restkv.testing import replay",
            "",
            f"policy = {written(self.policy, known)}",
            f"replay(policy, {self.law!r}{''.join(f', {key}={value!r}' for key, value in self.case.items())})",
        ]
        return "\n".join(lines) + "\n"


def _importable(cls: type) -> bool:
    return cls.__module__ != "__main__" and "<locals>" not in cls.__qualname__


def _allocation(value: object) -> str | None:
    return next((name for name, cls in ALLOCATIONS.items() if type(value) is cls and value == cls()), None)


def written(policy: Policy, by_name: bool = False) -> str:
    """A policy as Python has it, those options alone that are not their default.

    >>> from restkv.policies import SnapKV
    >>> written(SnapKV(12, window=4, budget_by="adakv"))
    "SnapKV(budget=12, window=4, budget_by='adakv')"
    """
    parts = []
    for option in fields(policy):
        value = getattr(policy, option.name)
        name = _allocation(value)
        if option.init and value != option.default and (name is None or name != option.default):
            parts.append(f"{option.name}={name or value!r}" if name is None else f"{option.name}={name!r}")
    cls = type(policy)
    return f"get_policy({', '.join([repr(policy.name), *parts])})" if by_name else f"{cls.__name__}({', '.join(parts)})"


@dataclass(frozen=True)
class Report:
    """What check_policy has looked at.

    Attributes:
        policy: as it was tried: a budget, a window and sinks that small cases outgrow.
        cases: of every law, how many cases have kept it.
        notes: what is no fault: why a score is not compiled, which laws the options do not admit.
    """

    policy: Policy
    cases: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kept = ", ".join(f"{law} {count}" for law, count in self.cases.items())
        return "; ".join([f"{self.policy.name}: kept every law ({kept})", *self.notes])


@own_modes
def check_policy(
    policy: Policy,
    *,
    examples: int = 100,
    sessions: int | None = None,
    seed: int = 0,
    laws: Sequence[str] | None = None,
    shrink: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Try a policy on random cases: every law that its options admit.

    Its window, sinks and budget are made so small (restkv.testing.fitted) that small cases outgrow them; all else is as given.

    Args:
        policy: a policy, made of your options.
        examples: observations that are drawn.
        sessions: how many sessions are run on tiny models; None: a tenth of `examples`, and no fewer than 3.
        seed: the same cases every time.
        laws: names of LAWS, or "traces", to try these alone.
        shrink: look for the smallest case where one breaks a law.
        progress: called with the name of a law and the number of cases that have kept it.
    Returns:
        What was tried, and remarks.
    Raises:
        LawBroken: a law is broken; it holds the smallest case found, and a script that runs it.
        PolicyError: `policy` is none, or there is no such law.

    >>> from restkv.policies import SnapKV
    >>> check_policy(SnapKV(64), examples=5).cases["columns"]
    5
    """
    require_policy(policy)
    _known(laws, (*LAWS, *(law.name for law in NOTED)))
    report = Report(fitted(policy))
    step = Search(report, examples, seed, shrink, progress)
    with torch.no_grad():
        step.run(OBSERVED, laws, looks(report.policy), lambda case: Choice(report.policy, case))
        step.run(LARGEST, laws, st.just(_large(policy)), lambda case: Choice(policy, case), 1)
        for law in NOTED:
            if (laws is None or law.name in laws) and (note := law.check(Choice(report.policy, Look(queries=4)))):
                report.notes.append(note)
        step.run(SESSIONS, laws, schedules(policy), Runs, sessions or max(3, examples // 10))
    return report


def _known(laws: Sequence[str] | None, names: Sequence[str]) -> None:
    for law in laws or ():
        if law not in names:
            raise PolicyError(f"law {law!r}: there is none of that name; choose from {', '.join(names)}")


def _large(policy: Policy) -> Look:
    budget = LARGE["columns"] // 2 if policy.budget is None else policy.budget_for(LARGE["columns"])
    return Look(
        queries=max(1, min(policy.observed_prompt, QUERIES)), budget=min(budget, LARGE["columns"] // 2), **LARGE
    )


@dataclass
class Search:
    """One check_policy going on."""

    report: Report
    examples: int
    seed: int
    shrink: bool
    progress: Progress | None

    def run(
        self,
        laws: Sequence[Law],
        names: Sequence[str] | None,
        cases: st.SearchStrategy[Any],
        subject: Callable[[Any], Any],
        examples: int | None = None,
    ) -> None:
        """Draw cases and try the laws of these names on each."""
        laws = [law for law in laws if names is None or law.name in names]
        if not laws:
            return
        phases = (Phase.generate, Phase.shrink) if self.shrink else (Phase.generate,)

        @seeded(self.seed)
        @settings(
            max_examples=examples or self.examples,
            phases=phases,
            deadline=None,
            database=None,
            derandomize=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(cases)
        def search(case: Any) -> None:
            on = subject(case)
            for law in laws:
                attempt(law, on, case.policy if isinstance(case, Job) else on.policy, case)
                self.report.cases[law.name] = self.report.cases.get(law.name, 0) + 1
                if self.progress is not None:
                    self.progress(law.name, self.report.cases[law.name])

        try:
            search()
        except LawBroken as error:
            error.__notes__ = []  # hypothesis says again, and less clearly, what the line says
            raise error from None


def attempt(law: Law, subject: Any, policy: Policy, case: Look | Job) -> None:
    """Try one law on one case.

    Raises:
        LawBroken: it is broken, or the policy fails.
    """
    try:
        wrong = law.check(subject)
    except PolicyError as error:
        if "protected" in str(error):  # a text may grow into more protected entries than fit; saying so is lawful
            return
        wrong = f"it raises {type(error).__name__}: {error}"
    except Exception as error:
        wrong = f"it raises {type(error).__name__}: {error}"
    if wrong is not None:
        raise LawBroken(policy, law, as_arguments(case), wrong)


def replay(policy: Policy, law: str, **case: Any) -> None:
    """Try one law on one case, as LawBroken.script has it.

    Args:
        policy: with the options of the case.
        law: a name of LAWS.
        case: fields of restkv.testing.Look, or for a law of sessions of restkv.testing.Job.
    Raises:
        LawBroken: it is broken.
        PolicyError: there is no such law, or a case has no such field.
    """
    _known([law], list(LAWS))
    kind = Job if LAWS[law] in SESSIONS else Look
    names = [name for name in inspect.signature(kind).parameters if name != "policy"]
    for name in case:
        if name not in names:
            raise PolicyError(f"replay: a case of {law!r} has no {name!r}; it has {', '.join(names)}")
    with torch.no_grad():
        if kind is Job:
            job = Job(policy, **case)
            attempt(LAWS[law], Runs(job), policy, job)
        else:
            look = Look(**case)
            attempt(LAWS[law], Choice(policy, look), policy, look)
